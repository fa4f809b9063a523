"""A table of text: to read on a terminal, and to keep as Markdown."""

from dataclasses import dataclass

from rich.table import Table


@dataclass(frozen=True)
class Sheet:
    """A table.

    Attributes:
        title: what it shows, in one line.
        columns: heads; the first column names the row.
        rows: cells.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def rich(self) -> Table:
        """For `rich.print`."""
        grid = Table(
            title=self.title, title_justify="left", title_style="bold", box=None, pad_edge=False
        )
        for i, head in enumerate(self.columns):
            grid.add_column(head, justify="right" if i else "left", no_wrap=True)
        for row in self.rows:
            grid.add_row(*row)
        return grid

    def markdown(self) -> str:
        """A heading and a table."""
        rule = ("---", *["---:"] * (len(self.columns) - 1))
        lines = [f"| {' | '.join(row)} |" for row in (self.columns, rule, *self.rows)]
        return "\n".join([f"### {self.title}", "", *lines, ""])
