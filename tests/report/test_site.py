"""The site: one page per run, nothing from the network, links that lead somewhere, nothing unescaped."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from matplotlib.figure import Figure

from thalweg.errors import ArgumentError
from thalweg.lab import Claim, Lab, record
from thalweg.recipes import PAPERS
from thalweg.report import write_site
from thalweg.report.command import main

NASTY = "<script>alert('&')</script>"


class Links(HTMLParser):
    """Collects every address that a page would load or lead to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.found += [value or "" for name, value in attributes if name in ("href", "src")]


def a_run(
    out: Path,
    name: str = "06_stochastic_neurons",
    kind: str = "recipe",
    holds: bool = True,
    preset: str = "small",
) -> Path:
    with Lab(
        out, name=name, kind=kind, config={"note": NASTY, "rate": 0.1}, seeds=[0, 1], preset=preset
    ) as lab:
        for step in range(3):
            lab.log(step=step, loss=1.0 / (step + 1))
        figure = Figure()
        figure.add_subplot().plot([1, 2])
        lab.figure("a curve".replace(" ", "_"), figure, NASTY)
        lab.table("Routes", ["route", "accuracy"], [["backprop", 0.91234567], ["noise", None]])
        lab.claims(
            [
                Claim(NASTY, "0.98 (Table 2)", 0.5, 0.01, holds=holds),
                Claim("only reported here", "none", float("nan"), holds=None, asserted=False),
            ]
        )
    return out


@pytest.fixture
def site(tmp_path: Path) -> Path:
    a_run(tmp_path / "runs" / "06_stochastic_neurons-small")
    a_run(tmp_path / "runs" / "my run #2", name="compare_classify", kind="compare", holds=False)
    with (
        pytest.raises(ZeroDivisionError),
        Lab(tmp_path / "runs" / "cut", name="cut", kind="recipe", config={}, seeds=[0]),
    ):
        1 / 0  # noqa: B018
    record(tmp_path / "runs" / "06_stochastic_neurons-small", tmp_path / "results", figure="a_curve")
    (tmp_path / "results" / "other.json").write_text("[1, 2]")
    return write_site(tmp_path / "runs", tmp_path / "site", results=tmp_path / "results").parent


def test_every_link_leads_to_a_file_of_the_site(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) == 1 + 4
    for page in pages:
        links = Links()
        links.feed(page.read_text())
        assert not links.tags & {"script", "link", "iframe", "object"}
        for address in links.found:
            assert ":" not in address, f"{page.name} leads out: {address}"
            assert not address.startswith("/")
            assert (page.parent / unquote(address)).is_file(), f"{page.name} leads nowhere: {address}"


def test_pages_load_nothing_from_the_network(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert "http:" not in text
        assert "https:" not in text
        assert "@import" not in text
        assert "url(" not in text


def test_what_users_wrote_is_escaped(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert NASTY not in page.read_text(), page
    assert "&lt;script&gt;" in (site / "runs" / "06_stochastic_neurons-small.html").read_text()


def test_the_board_lists_every_paper_with_words_for_each_standing(site: Path) -> None:
    index = (site / "index.html").read_text()
    for paper in PAPERS:
        assert paper.arxiv in index
    assert "not built" in index
    assert '<span class="tag good">holds</span>' in index


def test_a_page_shows_claims_table_metrics_and_configuration(site: Path) -> None:
    page = (site / "runs" / "my run #2.html").read_text()
    for text in ("0.5 ± 0.01", "0.98 (Table 2)", "does not hold", "only reported", "nan", "0.9123", "Routes"):
        assert text in page, text
    for text in ("0.3333", "loss", "torch", "rate", "seeds 0, 1"):
        assert text in page, text
    assert "not finished" in (site / "runs" / "cut.html").read_text()


def test_writing_twice_gives_the_same_site(site: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in site.rglob("*") if path.is_file()}
    write_site(tmp_path / "runs", site, results=tmp_path / "results")
    assert {path: path.read_bytes() for path in site.rglob("*") if path.is_file()} == before


def test_no_runs_give_the_board_and_a_run_is_not_written_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--runs", str(tmp_path / "none"), "--results", str(tmp_path / "none"), "--out"]
    assert main([*arguments, str(tmp_path / "site")]) == 0
    assert "No runs yet" in (tmp_path / "site" / "index.html").read_text()
    assert "index.html" in capsys.readouterr().out
    run = a_run(tmp_path / "runs" / "a")
    with pytest.raises(ArgumentError, match="out"):
        main([*arguments, str(run)])


def test_a_broken_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "run.json").write_text("{half")
    with pytest.raises(ArgumentError, match=r"run\.json"):
        write_site(tmp_path / "runs", tmp_path / "site", results=tmp_path)


@pytest.mark.parametrize(("preset", "recorded"), [("smoke", 0), ("small", 1)])
def test_a_smoke_run_has_a_page_and_does_not_stand_for_its_paper(
    preset: str, recorded: int, tmp_path: Path
) -> None:
    a_run(tmp_path / "runs" / "one", preset=preset)
    index = write_site(tmp_path / "runs", tmp_path / "site", results=tmp_path / "none").read_text()
    assert 'href="runs/one.html"' in index
    # once in the table of runs, and once more where the paper stands on the board
    assert index.count('href="runs/one.html"') == 1 + recorded
