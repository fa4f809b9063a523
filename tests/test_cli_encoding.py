"""What of the data is trained on: token ids and labels of every form, and the sample shown."""

import io
from pathlib import Path

import pytest
import torch
from cli_helpers import tiny_tokenizer
from helpers import smollm2_gguf
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fastlora.cli import console, encoding, preview
from fastlora.cli.console import UserError
from fastlora.cli.data import Chat, Data, Labelled, Pair, Text

IGNORED = encoding.IGNORED
PATH = Path("x.jsonl")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{%- generation -%}{{ m['content'] + '<|im_end|>' }}{%- endgeneration -%}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{% if loop.index0 % 2 %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
SPACED = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# what is in a turn: plain, and what a tokenizer may merge with what stands before or after
CONTENTS = ["three four", " three", "\n\nthree", "three \n", "\t é 日本\n\nx", "  "]


def chatml(template=CHATML):
    tokenizer = tiny_tokenizer()
    special = {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    tokenizer.add_special_tokens(special)
    tokenizer.chat_template = template
    return tokenizer


def merging():
    """ChatML by a tokenizer that merges line breaks and spaces."""
    tokenizer = Tokenizer(models.BPE())
    # offsets without leading spaces are what GPT-2's and Llama 3's tokenizers give
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["one\n\n\n\ntwo three four" * 9, "\n\n\n", "   x   x"], trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    wrapped.chat_template = CHATML
    return wrapped


def spaced():
    """A head that ends with a space, which tokenizers give to the word after it."""
    tokenizer = merging()
    tokenizer.chat_template = SPACED
    return tokenizer


def llama2():
    """A tokenizer in the manner of SentencePiece, which marks words by the space before them."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    corpus = ["[INST] one two [/INST] three four ", "日本é\t\n ?!", "three three three four four"]
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    wrapped.chat_template = LLAMA2
    return wrapped


def smollm2():
    path = smollm2_gguf()
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


MAKERS = {
    "chatml": chatml,
    "marked": lambda: chatml(MARKED),
    "merging": merging,
    "spaced": spaced,
    "llama2": llama2,
    "smollm2": smollm2,
}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module", params=MAKERS)
def chatting(request):
    return MAKERS[request.param]()


def pairs(*rows):
    return Data(PATH, "prompt", [Pair(f"{PATH}, line {i}", *row) for i, row in enumerate(rows, 1)])


def turns(*contents, system=None):
    """User and assistant by turns, the user first."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for number, content in enumerate(contents):
        messages.append({"role": ("user", "assistant")[number % 2], "content": content})
    return messages


def chats(*conversations):
    rows = [Chat(f"{PATH}, line {line}", row) for line, row in enumerate(conversations, 1)]
    return Data(PATH, "messages", rows)


def learnt(example):
    """The runs of token ids that are learnt, with the index at which each begins."""
    runs, before = [], IGNORED
    for at, label in enumerate(example["labels"]):
        if label != IGNORED:
            assert label == example["input_ids"][at]
            if before == IGNORED:
                runs.append((at, []))
            runs[-1][1].append(label)
        before = label
    return runs


# --- what is trained on ----------------------------------------------------------------------


def test_labels_cover_the_completion_and_its_end(tokenizer):
    data = encoding.encode(pairs(("one two", "three")), tokenizer, r"{prompt}\n", 64)
    (example,) = data.examples
    prompt = tokenizer("one two\n").input_ids
    completion = [*tokenizer("three").input_ids, tokenizer.eos_token_id]
    assert example["input_ids"] == prompt + completion
    assert example["labels"] == [IGNORED] * len(prompt) + completion
    assert (data.cut, data.dropped, data.tokens) == (0, 0, len(prompt + completion))


def test_labels_of_plain_text_start_at_the_second_token(tokenizer):
    data = Data(PATH, "text", [Text("", "one two")])
    (example,) = encoding.encode(data, tokenizer, "{prompt}", 64).examples
    ids = [*tokenizer("one two").input_ids, tokenizer.eos_token_id]
    assert example["input_ids"] == ids
    assert example["labels"] == [IGNORED, *ids[1:]]


def test_padding_is_masked_by_position_where_it_is_the_end_token(tokenizer):
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    eos = tokenizer.eos_token_id
    # an end token inside a completion is trained on like any other
    rows = pairs(("one", "two" + tokenizer.eos_token + "three"), ("one", "two"))
    data = encoding.encode(rows, tokenizer, "{prompt} ", 64)
    batch = encoding.Collator(eos)(data.examples)
    for row, example in enumerate(data.examples):
        length = len(example["input_ids"])
        assert batch["input_ids"][row, :length].tolist() == example["input_ids"]
        assert batch["labels"][row, :length].tolist() == example["labels"]
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (
            batch["labels"].shape[1] - length
        )
        assert (batch["labels"][row, length:] == IGNORED).all()
        assert (batch["input_ids"][row, length:] == eos).all()
    assert [(batch["labels"][row] == eos).sum().item() for row in (0, 1)] == [2, 1]


def test_what_is_too_long_is_counted_and_never_empty(tokenizer):
    rows = pairs(("one", "two " * 9), ("one " * 9, "two"), ("one", "two"))
    prompt = len(encoding.prompt_ids(tokenizer, r"{prompt}\n", "one"))
    data = encoding.encode(rows, tokenizer, r"{prompt}\n", prompt + 4)
    assert (data.cut, data.dropped, len(data.examples)) == (1, 1, 2)
    assert all(len(e["input_ids"]) <= prompt + 4 for e in data.examples)
    assert all(any(label != IGNORED for label in e["labels"]) for e in data.examples)
    # what is cut does not end
    assert data.examples[0]["labels"][-1] != tokenizer.eos_token_id
    with pytest.raises(
        UserError, match=f"max-length must leave room for completions, got {prompt}"
    ):
        encoding.encode(rows, tokenizer, r"{prompt}\n", prompt)


def test_prompts_are_closed_by_no_end_token(tokenizer):
    class Closing:
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, text, add_special_tokens=True, verbose=True):
            ids = tokenizer(text)
            if add_special_tokens:
                ids["input_ids"].append(self.eos_token_id)
            return ids

    for data in (pairs(("one", "two")), Data(PATH, "text", [Text("", "one two")])):
        got = encoding.encode(data, Closing(), "{prompt} ", 64).examples
        assert got == encoding.encode(data, tokenizer, "{prompt} ", 64).examples


def test_the_limit_names_the_file_and_labels_are_for_classes(tokenizer):
    with pytest.raises(UserError, match=r"got 2 and no row of x\.jsonl that is short enough"):
        encoding.encode(pairs(("one two", "three")), tokenizer, "{prompt}", 2)
    labelled = Data(PATH, "label", [Labelled("", "t", "a")])
    with pytest.raises(UserError, match=r"got text and label in x\.jsonl"):
        encoding.encode(labelled, tokenizer, "{prompt}", 64)
    for call in (encoding.label_set, lambda d: encoding.encode_labelled(d, tokenizer, ["a"], 9)):
        with pytest.raises(UserError, match=r"text and label, got neither in x\.jsonl"):
            call(pairs(("one", "two")))


# --- conversations ---------------------------------------------------------------------------


@pytest.mark.parametrize("second", CONTENTS)
@pytest.mark.parametrize("first", CONTENTS)
def test_answers_are_learnt_after_the_ids_that_generation_gives(chatting, first, second):
    """Ids before each answer are those of the prompt, and each answer ends with its end token."""
    contents = ("one", first, "two?", second)
    if chatting.chat_template == LLAMA2 and (first.isspace() or second.isspace()):
        pytest.skip("this template leaves nothing of a blank answer that could be told apart")
    messages = turns(*contents)
    (example,) = encoding.encode(chats(messages), chatting, "{prompt}", 999).examples
    runs = learnt(example)
    assert len(runs) == 2
    end = chatting.convert_tokens_to_ids(
        "</s>" if chatting.chat_template == LLAMA2 else "<|im_end|>"
    )
    for turn, (start, ids) in zip((1, 3), runs, strict=True):
        prompt = encoding.prompt_ids(chatting, "{prompt}", messages[:turn])
        before = example["input_ids"][:start]
        whole_before = turn == 1 or not _merges(chatting, messages[:turn])
        if whole_before:
            assert before == prompt
        assert chatting.decode(before) == chatting.decode(prompt)
        assert ids.count(end) == 1
        assert ids[-1] == end
        text = chatting.decode(ids[:-1])
        if chatting.chat_template == LLAMA2:
            text = text.strip()
            assert text == chatting.decode(_plain(chatting, contents[turn])).strip()
        else:
            assert text == contents[turn]


def _plain(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def _merges(tokenizer, messages):
    """Whether an earlier answer begins with what its tokenizer merges with the prompt's end."""
    before = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    after = tokenizer.apply_chat_template(messages[:2], tokenize=False)
    ids = _plain(tokenizer, before)
    return _plain(tokenizer, after)[: len(ids)] != ids


def test_some_answers_merge_with_what_stands_before(tokenizer):
    """Else the cases above would not show what is done about it."""
    assert any(_merges(merging(), turns("one", content)) for content in CONTENTS)
    assert not _merges(merging(), turns("one", "three"))


def test_all_but_the_assistant_is_masked():
    tokenizer = chatml()
    messages = [*turns("one", "two", "three", "four", system="five"), *turns("six")]
    (example,) = encoding.encode(chats(messages), tokenizer, "{prompt}", 999).examples
    texts = [tokenizer.decode(ids) for _, ids in learnt(example)]
    assert texts == ["two<|im_end|>", "four<|im_end|>"]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(example["input_ids"]) == whole
    # the template's own tags say the same
    marked = encoding.encode(chats(messages), chatml(MARKED), "{prompt}", 999)
    assert marked.examples == [example]


def test_tags_of_the_template_decide():
    """Only what stands between them is learnt, here not the end of the turn."""
    moved = ("+ '<|im_end|>' }}{%- endgeneration -%}", "}}{%- endgeneration -%}{{ '<|im_end|>' }}")
    assert moved[0] in MARKED
    tokenizer = chatml(MARKED.replace(*moved))
    (example,) = encoding.encode(chats(turns("one", "two")), tokenizer, "{prompt}", 99).examples
    assert [tokenizer.decode(ids) for _, ids in learnt(example)] == ["two"]


def test_prompts_become_turns_where_the_template_is_chat():
    tokenizer = chatml()
    data = encoding.encode(pairs(("one", "two"), ("", "x")), tokenizer, "chat", 99)
    assert data == encoding.encode(chats(turns("one", "two"), turns("", "x")), tokenizer, "", 99)
    ((start, _),) = learnt(data.examples[0])
    prompt = encoding.prompt_ids(tokenizer, "chat", "one")
    assert data.examples[0]["input_ids"][:start] == prompt
    assert tokenizer.decode(prompt) == "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"
    text = Data(PATH, "text", [Text("", "one")])
    assert encoding.encode(text, tokenizer, "chat", 99) == encoding.encode(text, tokenizer, "", 99)


def test_the_limit_may_fall_into_a_turn():
    tokenizer = chatml()
    long, late = turns("one", "two " * 9), turns("one " * 30, "two")
    full = encoding.encode(chats(long), tokenizer, "", 999).examples[0]
    limit = len(full["input_ids"]) - 3
    data = encoding.encode(chats(long, late, turns("one", "two")), tokenizer, "", limit)
    assert (data.cut, data.dropped, len(data.examples)) == (1, 1, 2)
    assert data.examples[0] == {name: ids[:limit] for name, ids in full.items()}
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end not in data.examples[0]["labels"]
    assert end in data.examples[1]["labels"]


def test_the_start_of_a_text_is_written_once():
    """The template writes it, so the tokenizer must not, and nothing predicts it."""
    tokenizer = llama2()
    for ids in (
        encoding.encode(chats(turns("one", "two")), tokenizer, "", 99).examples[0]["input_ids"],
        encoding.prompt_ids(tokenizer, "chat", "one"),
    ):
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1
    bare = chatml("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    first = encoding.encode(chats([*turns("", "one two three")]), bare, "", 99).examples[0]
    assert first["labels"][0] == IGNORED


# as templates that leave out what the assistant thought before
REWRITES = CHATML.replace(
    "m['content']",
    "(m['content'] if loop.last or m['role'] == 'user' else m['content'].upper())",
)
OTHER_HEAD = CHATML.replace("assistant\n'", "robot\n'")


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (None, turns("one", "two"), "must have a chat template, got none; use data with prompt"),
        (REWRITES, turns("one", "two", "three"), "x.jsonl, line 2, turn 2: the chat template must"),
        (OTHER_HEAD, turns("one", "two"), "x.jsonl, line 2, turn 2: the chat template must leave"),
        (CHATML, turns("x", "one", "two")[1:], "x.jsonl, line 2, turn 1: the assistant must answ"),
        (LLAMA2, turns("one", "two", system="x"), "x.jsonl, line 2: the chat template must take"),
        (LLAMA2, turns("one", "two", system="x"), "got only user and assistant"),
        (
            "{{ messages[7]['content'] }}",
            turns("one", "two"),
            "line 2: the chat template must take",
        ),
        ("{{ 'a' + 1 }}", turns("one", "two"), "line 2: the chat template must take the conversat"),
        ("{% if %}", turns("one", "two"), "line 2: the chat template must take the conversation"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_conversations_that_the_template_does_not_take(template, messages, message):
    tokenizer = chatml(template)
    rows = [Chat("x.jsonl, line 2", messages)]
    with pytest.raises(UserError) as error:
        encoding.encode(Data(PATH, "messages", rows), tokenizer, "", 99)
    assert message in str(error.value)


def test_prompts_need_a_chat_template_too(tokenizer):
    for template, prompt in (("chat", "one"), ("{prompt}", turns("one"))):
        with pytest.raises(UserError, match="must have a chat template, got none"):
            encoding.prompt_ids(tokenizer, template, prompt)


def test_slow_tokenizers_cannot_tell_where_turns_begin(monkeypatch):
    tokenizer = chatml()
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(UserError, match="the tokenizer must be a fast one to learn from messages"):
        encoding.encode(chats(turns("one", "two")), tokenizer, "", 99)


# --- classes ---------------------------------------------------------------------------------


def labelled(*rows):
    return Data(PATH, "label", [Labelled(f"{PATH}, line {i}", *r) for i, r in enumerate(rows, 1)])


@pytest.fixture(scope="module")
def bert():
    """A tokenizer that opens and closes a text."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]"})
    ends = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=ends
    )
    return tokenizer


def test_classes_are_numbered_and_special_tokens_stay(bert, tokenizer):
    data = labelled(("one two three four", "b"), ("", "a"), ("one", "a"))
    got = encoding.encode_labelled(data, bert, ["a", "b"], 5)
    assert (got.cut, got.dropped) == (1, 1)
    text = tokenizer("one two three four").input_ids
    ends = bert.cls_token_id, bert.sep_token_id
    assert len(text) > 3
    assert got.examples[0] == {"input_ids": [ends[0], *text[:3], ends[1]], "labels": 1}
    one = tokenizer("one").input_ids
    assert got.examples[1] == {"input_ids": [ends[0], *one, ends[1]], "labels": 0}
    # a decoder's tokenizer adds nothing
    bare = encoding.encode_labelled(data, tokenizer, ["a", "b"], 2)
    assert [e["input_ids"] for e in bare.examples] == [text[:2], one]
    assert bert("one two three four").input_ids == [ends[0], *text, ends[1]], (
        "nothing stays switched on"
    )


def test_batches_of_classes(bert):
    data = encoding.encode_labelled(labelled(("one two", "b"), ("one", "a")), bert, ["a", "b"], 99)
    batch = encoding.Collator(0)(data.examples)
    assert batch["labels"].dtype == torch.int64
    assert batch["labels"].tolist() == [1, 0]
    lengths = [len(example["input_ids"]) for example in data.examples]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert batch["input_ids"].shape == (2, max(lengths))


def test_bad_classes(bert):
    data = labelled(("one", "a"), ("two", "c"))
    with pytest.raises(UserError) as error:
        encoding.encode_labelled(data, bert, ["a", "b"], 99)
    assert str(error.value) == "x.jsonl, line 2: label must be one of a, b, got 'c'"
    with pytest.raises(UserError, match="max-length must leave room for text, got 2 and no row"):
        encoding.encode_labelled(data, bert, ["a", "c"], 2)
    with pytest.raises(UserError, match=r"at least 2 values, got only 'a' in x\.jsonl"):
        encoding.label_set(labelled(("one", "a"), ("two", "a")))


@pytest.mark.parametrize(
    "labels",
    [["-1", "0", "2", "10"], ["1.5", "2", "10.25"], ["10", "9", "a"], ["B", "a", "é"], ["01", "1"]],
)
def test_classes_in_order(labels):
    data = labelled(*(("one", label) for label in [*reversed(labels), *labels]))
    assert encoding.label_set(data) == labels


# --- the sample ------------------------------------------------------------------------------


@pytest.fixture
def screen(monkeypatch):
    """Replace the console; returns what shows a dataset and gives back the characters."""

    def use(terminal):
        colors = {"force_terminal": True, "color_system": "standard"} if terminal else {}
        fake = Console(file=io.StringIO(), highlight=False, width=80, _environ={}, **colors)
        for module in (console, preview):
            monkeypatch.setattr(module, "console", fake)
        return fake.file

    return use


def test_sample_on_a_terminal(screen):
    file = screen(terminal=True)
    tokenizer = chatml()
    data = encoding.encode(chats(turns("one", "two\x1b[31m"), turns("x", "y")), tokenizer, "", 99)
    preview.show(data, tokenizer)
    first, rest = file.getvalue().split("\n", 1)
    assert "sample" in first
    assert first.endswith("the first of 2 examples; what is learnt is bold, the rest dim")
    assert rest == (
        "\x1b[2m<|im_start|>user\x1b[0m\n\x1b[2mone<|im_end|>\x1b[0m\n"
        "\x1b[2m<|im_start|>assistant\x1b[0m\n\x1b[1mtwo\\x1b[31m<|im_end|>\x1b[0m\n"
    )


def test_sample_in_a_file(screen):
    tokenizer = chatml()
    data = encoding.encode(chats(turns("one", " two", "x", "y")), tokenizer, "", 99)
    file = screen(terminal=False)
    preview.show(data, tokenizer)
    first, rest = file.getvalue().split("\n", 1)
    assert first.endswith("what is learnt is between ⟦ and ⟧")
    assert rest == (
        "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n⟦ two<|im_end|>⟧\n"
        "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n⟦y<|im_end|>⟧\n"
    )


def test_sample_of_a_class(screen, bert):
    file = screen(terminal=False)
    data = encoding.encode_labelled(labelled(("one", "b"), ("x", "a")), bert, ["a", "b"], 99)
    preview.show(data, bert, ["a", "b"])
    assert file.getvalue().endswith("\n[CLS]one[SEP] → ⟦b⟧\n")


def test_sample_keeps_spaces_and_characters_that_tokens_share(screen):
    tokenizer = llama2()
    file = screen(terminal=False)
    preview.show(encoding.encode(chats(turns("one", "three")), tokenizer, "", 99), tokenizer)
    assert "[/INST]⟦ three </s>⟧" in file.getvalue()
    # the two bytes of a character, one given and one learnt
    tokenizer = tiny_tokenizer()
    ids = tokenizer("é").input_ids
    assert len(ids) == 2
    file = screen(terminal=False)
    example = {"input_ids": ids, "labels": [IGNORED, ids[1]]}
    preview.show(encoding.Dataset([example], 0, 0), tokenizer)
    assert file.getvalue().endswith("⟦é⟧\n")


@pytest.mark.parametrize(
    ("contents", "seen"),
    [
        (("one " * 900, "two"), ["⟦two<|im_end|>⟧", "user\none", "one <|im_end|>", " … "]),
        (("one", "two " * 900), ["assistant\n⟦two two", "two <|im_end|>⟧", " … "]),
        (("one " * 900, "two " * 900), ["one <|im_end|>", "⟦two two", " … "]),
        (("one", "two") * 60, ["⟦two<|im_end|>⟧", " …\n"]),
    ],
    ids=["prompt", "answer", "both", "turns"],
)
def test_long_samples_are_cut_and_show_where_learning_begins(screen, contents, seen):
    tokenizer = chatml()
    file = screen(terminal=False)
    preview.show(encoding.encode(chats(turns(*contents)), tokenizer, "", 9999), tokenizer)
    text = file.getvalue().split("\n", 1)[1]
    assert all(piece in text for piece in seen)
    assert 0.7 * preview.LONGEST < len(text) < 1.1 * preview.LONGEST


def test_description_counts_what_was_lost(screen):
    file = screen(terminal=False)
    tokenizer = chatml()
    rows = chats(turns("one", "two two two two"), turns("one " * 30, "two"), turns("one", "two"))
    limit = len(
        encoding.encode(chats(turns("one", "two")), tokenizer, "", 99).examples[0]["labels"]
    )
    data = encoding.encode(rows, tokenizer, "", limit)
    encoding.describe(data, limit)
    assert file.getvalue() == (
        f"    data  2 examples, {2 * limit} tokens, 1 cut at {limit} tokens, "
        f"1 dropped, nothing learnt in {limit} tokens\n"
    )
