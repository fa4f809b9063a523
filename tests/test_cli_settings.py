"""Settings of a run: the command line, YAML files, and what a run that goes on may change."""

import pytest
import typer
from cli_helpers import invoke, one_line

from fastlora.cli import settings
from fastlora.cli.console import UserError
from fastlora.cli.settings import TrainSettings, read_yaml, with_settings


@pytest.fixture
def parse(tmp_path):
    """Parse words, with the text of a config, into settings and what was given."""

    def run(*words, config=None):
        app = typer.Typer(add_completion=False)

        @app.command()
        @with_settings
        def command(
            settings: TrainSettings,
            given: dict,
            config: str = typer.Option(None, is_eager=True, callback=use),
        ):
            return settings, given

        if config is not None:
            (tmp_path / "run.yaml").write_text(config)
            words = (*words, "--config", str(tmp_path / "run.yaml"))
        return typer.main.get_command(app).main([*words], standalone_mode=False)

    def use(context: typer.Context, value: str):
        return settings.use_config(context, tmp_path / "run.yaml" if value else None)

    return run


CONFIG = """
# numbers as people write them
model: org/name
data: train.jsonl
lr: 1e-3
rank: 4
target-modules: [q_proj, v_proj]
double_quant: no
rslora: true
fields: {prompt: question, completion: answer}
template: "{prompt}\\n\\n"
steps:
"""


def test_yaml_has_the_same_settings_and_the_command_line_wins(parse):
    chosen, given = parse(config=CONFIG)
    assert chosen == TrainSettings(
        model="org/name",
        data=settings.Path("train.jsonl"),
        lr=1e-3,
        rank=4,
        target_modules="q_proj,v_proj",
        double_quant=False,
        rslora=True,
        fields="prompt=question,completion=answer",
        template="{prompt}\n\n",
    )
    assert given.keys() == {
        *("model", "data", "lr", "rank", "target_modules", "double_quant", "rslora"),
        *("fields", "template"),
    }
    over, given = parse("other", "--rank", "8", "--no-rslora", "--double-quant", config=CONFIG)
    assert (over.model, over.rank, over.rslora, over.double_quant) == ("other", 8, False, True)
    assert over.lr == 1e-3
    assert given["rank"] == 8
    assert parse() == (TrainSettings(), {})


def test_the_command_line_excludes_what_the_file_has_in_its_place(parse):
    config = "epochs: 3\neval_share: 0.1\npacking: yes\n"
    chosen, given = parse("--steps", "2", "--eval-data", "x", "--group-by-length", config=config)
    assert (chosen.epochs, chosen.steps) == (None, 2)
    assert (chosen.eval_share, str(chosen.eval_data)) == (0.0, "x")
    assert (chosen.packing, chosen.group_by_length) == (False, True)
    assert given.keys() == {"steps", "eval_data", "group_by_length"}
    for both in ("epochs: 3\nsteps: 2", "packing: 1\ngroup-by-length: 1"):
        with pytest.raises(UserError, match="must not both be given"):
            parse(config=both)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("warmup: 2.5", "warmup must be whole steps or a share below 1, got 2.5"),
        ("eval_examples: 3", "eval-examples must have eval-data or eval-share"),
        ("{", "must be readable YAML, got"),
        ("[" * 100_000, "must be readable YAML, got"),
        ("- rank", "must hold keys with values, got list"),
        ("rank", "must hold keys with values, got str"),
        ("1: 2\n? [a]\n: 3", "must"),
        ("rnak: 8", "keys must be settings, got rnak, did you mean rank"),
        ("learning_rate: 8", "keys must be settings, got learning_rate"),
        ("wat: 8", "got wat; there are model, data, output, rank"),
        ("rank: 8.5", "'--rank'"),
        ("rank: true", "'--rank'"),
        ("rank: 0", "'--rank'"),
        ("lr: fast", "'--lr'"),
        ("quantize: int8", "'int8' is not one of"),
        ("double_quant: maybe", "'--double-quant'"),
        ("dtype: [fp32, bf16]", "'fp32,bf16' is not one of"),
        ("blocksize: 65", "blocksize must be one of"),
        ("page_budget: 1GiB", "page-budget must be for a paged optimizer, got adamw"),
        ("page_folder: .\noptim: sgd", "page-folder must be for a paged optimizer, got sgd"),
        ("page_budget: 1GX\noptim: paged_adamw", "page-budget: a size must be bytes, or a number"),
        ("page_budget: 9kB\noptim: paged_adamw", "page-budget must be at least 128KiB, got 9kB"),
        ("lora_plus_ratio: 4\noptim: sgd", "lora-plus-ratio must be for one of the adamw, got sgd"),
        ("lora_plus_ratio: 0", "lora-plus-ratio must be above 0, got 0"),
        ("page_folder: no/such\noptim: paged_adamw8bit", "page-folder must be a folder, got"),
        ("template: wat", "template must be chat or contain {prompt} exactly once, got 'wat'"),
    ],
    ids=lambda text: text[:20],
)
def test_bad_config_is_one_line(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    result = invoke("train", "m", "d", "-o", tmp_path / "out", "--config", tmp_path / "run.yaml")
    assert result.exit_code == 2
    assert message in one_line(result)


def test_missing_config_is_one_line(tmp_path):
    result = invoke("train", "--config", tmp_path / "none.yaml")
    assert result.exit_code == 2
    assert "none.yaml must be readable YAML, got" in one_line(result)


def test_settings_round_trip_and_override(tmp_path, parse):
    run = TrainSettings(
        model="m", data=tmp_path / "d", rank=4, steps=3, template="<{prompt}>\n", quantize="none"
    )
    run.save(tmp_path)
    assert TrainSettings.load(tmp_path) == run
    loaded = TrainSettings.load(tmp_path, quantize="nf4", dtype=None)
    assert (loaded.quantize, loaded.dtype, loaded.rank) == ("nf4", "auto", 4)
    assert TrainSettings.load(tmp_path / "none") == TrainSettings()
    # what a run saved is a config
    assert parse(config=(tmp_path / "settings.yaml").read_text())[0] == run


def test_numbers_survive_to_the_bit(tmp_path):
    run = TrainSettings(lr=1e-5, warmup=0.1 + 0.2, dropout=1 / 3, alpha=1e22)
    run.save(tmp_path)
    assert TrainSettings.load(tmp_path) == run


def test_settings_of_later_versions(tmp_path):
    (tmp_path / "settings.yaml").write_text("later: [1]\nlr: 1\nepochs: null\nsteps: 3\n")
    assert TrainSettings.load(tmp_path) == TrainSettings(lr=1.0, steps=3)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "readable YAML"), ("rank: x", "'--rank'"), ("rank: 0", "'--rank'")]
)
def test_bad_settings_of_a_run_name_the_file(tmp_path, text, message):
    (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        TrainSettings.load(tmp_path)
    assert message in str(error.value)
    assert str(tmp_path / "settings.yaml") in str(error.value)


def test_a_resumed_run_keeps_what_it_computes(tmp_path):
    run = TrainSettings(model="org/m", data=tmp_path / "d", epochs=2, lr=1e-3).absolute()
    assert run.resumed({}) == run
    longer = run.resumed({"steps": 9, "lr": 1e-3, "save_steps": 5})
    assert (longer.steps, longer.epochs, longer.save_steps) == (9, None, 5)
    for name, value in {"lr": 2e-3, "rank": 8, "seed": 1, "data": tmp_path / "e"}.items():
        with pytest.raises(UserError, match=f"{name} must be that of the run to resume"):
            run.resumed({name: value})


def test_a_run_that_goes_on_without_pages_has_no_page_settings(tmp_path):
    run = TrainSettings(model="org/m", data=tmp_path / "d", optim="paged_adamw", page_budget="1MB")
    resident = run.resumed({"optim": "adamw"})
    assert (resident.optim, resident.page_budget) == ("adamw", None)
    assert resident.resumed({"optim": "paged_adamw"}).page_budget is None
    with pytest.raises(UserError, match="page-budget must be for a paged optimizer"):
        run.resumed({"optim": "adamw", "page_budget": "1MB"})


def test_page_budgets_are_read_as_people_write_them():
    sizes = {"auto": None, "256MiB": 2**28, "1.5 gb": 15 * 10**8, "200000": 200_000}
    for text, count in sizes.items():
        assert TrainSettings(optim="paged_adamw", page_budget=text).page_bytes == count
    assert TrainSettings(optim="paged_adamw").page_bytes is None


def test_paths_become_absolute_and_hub_names_do_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    run = TrainSettings(model="tiny", data=settings.Path("d"), output=settings.Path("o"))
    assert run.absolute().model == str(tmp_path / "tiny")
    assert run.absolute().data == tmp_path / "d"
    # so that a run goes on from where it was begun, by the same words
    assert run.absolute().resumed({"model": "tiny", "data": settings.Path("d")}) == run.absolute()
    assert TrainSettings(model="org/name").absolute().model == "org/name"


def test_lists_and_mappings_become_words(tmp_path):
    (tmp_path / "x.yaml").write_text("a: [1, b]\nb: {c: d, e: f}\nc: ~\nd: null\ne: ''\nf: no\n")
    assert read_yaml(tmp_path / "x.yaml") == {"a": "1,b", "b": "c=d,e=f", "f": "no"}
