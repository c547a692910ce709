"""The report's page in a real headless Chromium: loads silently, sorts, searches, opens, goes back, fits a phone."""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from hafs_evaluate.report.report import write_report
from tests.support.browser import NEEDS_CHROMIUM, OVERFLOW, PHONE, api, visiting
from tests.support.report_workspace import (
    make_experiment,
    make_workspace,
    write_hierarchy,
    write_latents,
    write_many_latents,
)

pytestmark = NEEDS_CHROMIUM

RUNS = ("baseline-s0", "strict-s0", "adaptive-s0", "baseline-relu-s0")
LATENTS = 300
DESKTOP = {"width": 1280, "height": 900}
SEEN = "all => all.filter(one => one.getClientRects().length).length"  # a level line has a box, though without height


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a page of four single runs with 300 latents each."""
    folder = make_workspace(tmp_path_factory.mktemp("demo") / "offline", RUNS)
    (folder / "labels.csv").write_text("variant,latent,label\nadaptive,20,kings & queens\nadaptive-s0,21,rivers\n")
    return written(folder, LATENTS, contexts=4)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a page of twelve arms of three seeds."""
    folder = tmp_path_factory.mktemp("experiment") / "offline"
    write_report(make_experiment(folder, variants=("baseline", "adaptive", "random_init")))
    return address(folder)


def written(folder: Path, latents: int, contexts: int) -> str:
    for number, run in enumerate(RUNS):
        write_many_latents(folder, run, latents, contexts, number, others=True)
        write_hierarchy(folder, run, 0.6 + 0.05 * number)
    write_report(folder)
    return address(folder)


def address(folder: Path) -> str:
    return (folder / "report" / "index.html").as_uri()


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    """See `visiting`; the page's files lie beside it."""
    with visiting(browser, DESKTOP, lambda _, asked: asked.startswith(("file:", "data:"))) as open_page:
        yield open_page


def explore(page: Any) -> None:
    page.locator("#latents").scroll_into_view_if_needed()
    page.locator("#rows .row").first.wait_for()


def column(page: Any, place: int) -> list[str]:
    """The shown rows' texts of one column, from the top of the list."""
    return page.locator("#rows .row").evaluate_all(
        f"rows => rows.map(row => [parseFloat(row.style.top), row.children[{place}].textContent])"
        ".sort((a, b) => a[0] - b[0]).map(([, text]) => text)"
    )


def numbers(texts: list[str]) -> list[float]:
    return [float(re.sub("[#%]", "", text)) for text in texts]


def hash_of(page: Any) -> str:
    return page.evaluate("location.hash")


def test_a_page_loads_without_a_word_and_asks_for_nothing(visit, demo, experiment):
    for url in (demo, experiment):
        page = visit(url)
        page.wait_for_load_state()
        for section in ("arms", "frontiers", "training", "probing", "hierarchy", "dictionary", "latents", "provenance"):
            page.locator(f"#{section}").scroll_into_view_if_needed()
            assert page.locator(f"#{section} h2").is_visible()
        assert page.locator("figure svg").count() > 12


def test_the_complaints_of_a_page_are_heard(browser, tmp_path):
    path = tmp_path / "page.html"
    path.write_text("<script>console.error('loud'); missing()</script><img src='http://127.0.0.1:9/x.png'>")
    heard = []
    page = browser.new_page()
    page.on("console", lambda message: heard.append(message.text))
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.on("request", lambda request: heard.append(request.url))
    page.goto(path.as_uri())
    page.close()
    assert any("loud" in one for one in heard)
    assert any("missing is not defined" in one for one in heard)
    assert "http://127.0.0.1:9/x.png" in heard


def test_the_list_sorts_by_every_column_both_ways(visit, demo):
    page = visit(demo)
    explore(page)
    heads = page.locator("#columns [data-sort]")
    names = [heads.nth(i).get_attribute("data-sort") for i in range(heads.count())]
    assert names == ["index", "density", "max_activation", "cosine", "purity", "selectivity", "name"]
    assert numbers(column(page, 5)) == sorted(numbers(column(page, 5)), reverse=True)  # not the densest first
    cut = "heads => heads.slice(0, -1).filter(one => one.scrollWidth > one.clientWidth).map(one => one.textContent)"
    assert heads.evaluate_all(cut) == []
    assert page.locator("#list").evaluate("list => list.scrollWidth - list.clientWidth") <= 0  # the names are in view
    for place, name in enumerate(names[:-1]):
        head = page.locator(f"#columns [data-sort={name}]")
        orders = []
        for _ in range(2):
            head.click()
            shown = numbers(column(page, place))
            assert len(set(shown)) > 5
            assert shown == sorted(shown) or shown == sorted(shown, reverse=True)
            orders.append(shown == sorted(shown))
        assert orders[0] != orders[1], name
    page.locator("#columns [data-sort=name]").click()
    assert column(page, 6)[:20] == sorted(column(page, 6)[:20], key=str.lower)
    page.locator("#sort").select_option("cosine")
    assert numbers(column(page, 3)) == sorted(numbers(column(page, 3)), reverse=True)
    assert "sort=cosine" in hash_of(page)


def test_a_search_finds_tokens_titles_promoted_tokens_and_indices(visit, demo):
    page = visit(demo)
    explore(page)
    for query, enough in (("title 17", 1), ("z51", 1), ("#42", 1)):
        page.locator("#search").fill(query)
        api.expect(page).to_have_url(re.compile(re.escape(urlencode({"q": query}))))  # drawn when the address says so
        api.expect(page.locator("#count")).to_contain_text(f" of {LATENTS}")
        assert page.locator("#rows .row").count() >= enough
    assert column(page, 0)[0] == "#42"
    page.locator("#search").fill("no such text at all")
    page.locator("#rows .missing").wait_for()
    page.locator("#search").fill("")
    api.expect(page.locator("#count")).to_have_text(f"{LATENTS} latents")


def test_a_token_of_spaces_alone_is_no_empty_place(visit, tmp_path):
    folder = make_workspace(tmp_path / "offline", RUNS[:1])
    write_latents(folder, RUNS[0], ["The", "  ", " fox"])
    write_report(folder)
    page = visit(address(folder) + "#latent=3")
    explore(page)
    api.expect(page.locator("#rows .row .token").first).to_have_text("␣␣")
    api.expect(page.locator("#detail .chip").first).to_have_text("␣␣")


def test_only_the_rows_in_view_are_in_the_page(visit, demo):
    page = visit(demo)
    explore(page)
    assert page.locator("#rows .row").count() < 70
    page.locator("#list").evaluate("list => { list.scrollTop = list.scrollHeight }")
    page.locator(f"#rows .row[aria-rowindex='{LATENTS}']").wait_for()
    assert page.locator("#rows .row").count() < 70


def test_a_latent_opens_with_everything_known_of_it(visit, demo):
    page = visit(demo + "#variant=adaptive&latent=20")
    detail = page.locator("#detail")
    detail.locator("h3").wait_for()
    text = detail.inner_text()
    for said in (
        "adaptive #20",
        "selectivity",
        "topic: Arts, 50% of where it fires against 10%",
        "fires with",
        "PMI 2.5",
        "child #22",
        "peer #1",
        "Top contexts (4)",
    ):
        assert said in text, said
    assert "Contexts by quantile of the activation (4)" in text
    assert "88th percentile · text" in text and "13th percentile" in text
    assert "kings & queens" in text
    assert "+2.9" in text and "95% of random directions stay under 4.6" in text
    assert detail.locator(".histogram rect").count() == 24
    assert detail.locator(".context").count() == 8
    assert detail.locator(".context .peak").count() == 8
    shade = detail.locator(".context .peak").first.evaluate("span => getComputedStyle(span).backgroundColor")
    assert shade.startswith("rgba(255, 166, 43")
    assert detail.locator("dd a", has_text="#22").count() == 2  # nearest, fires with
    assert detail.locator("dt", has_text="nearest").locator("+ dd a").count() == 6
    assert detail.locator("dd a", has_text=re.compile("^#1$")).count() == 1  # not in the sample, but in a side file
    assert detail.locator(".absent").count() == 0
    box = page.locator("#explorer").bounding_box()
    assert -5 <= box["y"] < 200  # a shared link shows the latent, not the top of the page


def test_a_latent_is_compared_across_variants(visit, demo):
    page = visit(demo + "#variant=adaptive&latent=20")
    page.locator("#compare summary").click()
    cards = page.locator("#compare .card")
    api.expect(cards).to_have_count(3)
    strict = cards.filter(has=page.locator("h5", has_text="strict"))
    assert "nearest by decoder cosine, 0.91" in strict.inner_text()
    strict.locator("a").click()
    assert page.locator("#detail h3").inner_text() == "strict #22"
    assert page.locator("[data-variant=strict]").get_attribute("aria-pressed") == "true"
    api.expect(page.locator("#compare .card")).to_have_count(3)  # it stays open from latent to latent


def test_the_hash_holds_what_is_shown_and_back_goes_back(visit, demo):
    page = visit(demo)
    explore(page)
    page.locator("[data-variant=strict]").click()
    page.locator("#columns [data-sort=index]").click()
    page.locator("#rows [data-index='4']").click()
    page.locator("#rows [data-index='6']").click()
    assert page.locator("#detail h3").inner_text() == "strict #6"
    page.go_back()
    assert page.locator("#detail h3").inner_text() == "strict #4"
    page.go_forward()
    assert page.locator("#detail h3").inner_text() == "strict #6"
    page.locator("#search").fill("title 1")
    api.expect(page).to_have_url(re.compile("title"))
    again = visit(page.url)
    again.locator("#detail h3").wait_for()
    assert again.locator("#detail h3").inner_text() == "strict #6"
    assert again.locator("#search").input_value() == "title 1"
    assert again.locator("#sort").input_value() == "index"
    assert column(again, 0) == column(page, 0)
    assert hash_of(again) == hash_of(page)
    again.goto(demo + "#training")
    assert again.locator("#training h2").is_visible()


def test_the_keyboard_alone_is_enough(visit, demo):
    page = visit(demo)
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    page.keyboard.type("title")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "list"
    page.keyboard.press("Escape")
    first = page.locator("#rows .row[data-cursor]").get_attribute("aria-rowindex")
    for key in ("j", "j", "k", "j"):
        page.keyboard.press(key)
    assert int(page.locator("#rows .row[data-cursor]").get_attribute("aria-rowindex")) == int(first) + 2
    index = page.locator("#rows .row[data-cursor]").get_attribute("data-index")
    page.keyboard.press("Enter")
    assert page.locator("#detail h3").inner_text() == f"baseline #{index}"
    assert f"latent={index}" in hash_of(page)
    page.keyboard.press("c")
    api.expect(page.locator("#compare .card")).to_have_count(3)
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#help").is_visible()
    assert page.locator("#detail h3").count() == 1
    page.keyboard.press("Escape")
    assert page.locator("#detail h3").count() == 0
    assert "latent=" not in hash_of(page)


def test_nothing_is_wider_than_a_phone(visit, demo, experiment):
    for url in (demo + "#variant=adaptive&latent=20", experiment):
        page = visit(url, viewport=PHONE)
        for section in ("arms", "frontiers", "hierarchy", "dictionary", "latents"):
            page.locator(f"#{section}").scroll_into_view_if_needed()
            page.wait_for_timeout(100)
            assert page.evaluate(OVERFLOW) <= 0, section
    page = visit(demo + "#variant=adaptive&latent=20", viewport=PHONE)
    page.locator("#compare summary").click()
    page.locator("#compare .card").first.wait_for()
    assert page.evaluate(OVERFLOW) <= 0
    heads = page.locator("#columns [data-sort]")
    names = heads.evaluate_all("heads => heads.map(head => head.dataset.sort)")
    assert names == ["index", "selectivity", "name"]  # of the figures the one alone that the list is sorted by
    edge = page.locator("#list").bounding_box()
    for i in range(3):
        box = heads.nth(i).bounding_box()
        assert box["x"] >= edge["x"] and box["x"] + box["width"] <= edge["x"] + edge["width"]
    assert page.locator("#rows .row .token").first.bounding_box()["width"] > 100
    shown = page.locator("#detail p, #rows span")
    sizes = shown.evaluate_all("elements => elements.map(element => parseFloat(getComputedStyle(element).fontSize))")
    assert min(sizes) >= 11


def contrast(page: Any, selector: str) -> float:
    """The least WCAG contrast of the visible elements' text with what is behind it."""
    return page.evaluate(
        """selector => {
          const parse = text => text.match(/[\\d.]+/g).map(Number);
          const linear = v => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
          const light = rgb => [0.2126, 0.7152, 0.0722].reduce((sum, w, i) => sum + w * linear(rgb[i] / 255), 0);
          const behind = element => {
            for (let at = element; at; at = at.parentElement) {
              const colour = parse(getComputedStyle(at).backgroundColor);
              if (colour.length < 4 || colour[3] === 1) return colour;
            }
            return [255, 255, 255];
          };
          return Math.min(...[...document.querySelectorAll(selector)].filter(e => e.offsetParent).map(e => {
            const [a, b] = [light(parse(getComputedStyle(e).color)), light(behind(e))];
            return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
          }));
        }""",
        selector,
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_are_both_readable(visit, experiment, scheme):
    page = visit(experiment, color_scheme=scheme)
    page.locator("#tree").scroll_into_view_if_needed()
    page.locator("table.tree td").first.wait_for()
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 28)"}[scheme]
    for selector in ("p, td, th, li, button, label, h2, h3", "table.tree td", "td.verdict, .falsifiers b"):
        assert contrast(page, selector) >= 4.5, selector


def test_the_tree_is_coloured_folded_and_switched(visit, experiment):
    page = visit(experiment)
    page.locator("#tree").scroll_into_view_if_needed()
    rows = page.locator("table.tree tbody tr")
    rows.first.wait_for()
    assert rows.locator("th > span:not(.leaf)").all_inner_texts() == ["people", "arts", "actor", "sport"]
    heads = page.locator("table.tree thead th").all_inner_texts()
    assert heads == ["class", "baseline-k16", "adaptive-k16", "random_init-k16", "LM full probe", "LM top-k", "LM PCA"]
    cell = rows.first.locator("td").first
    assert re.fullmatch(r"0\.62\d ± 0\.0\d\d", cell.inner_text().replace("\n", " "))
    before = cell.evaluate("cell => cell.style.background")
    page.locator("[data-tree-choice=Latents]").select_option("5")
    cell = rows.first.locator("td").first
    assert cell.inner_text().startswith("0.72")
    assert cell.evaluate("cell => cell.style.background") != before
    page.locator("[data-tree-choice=Contrast]").select_option("siblings")
    assert rows.first.locator("td").first.inner_text() == ""  # the root has no siblings
    page.locator("[data-tree-choice=Score]").select_option("hole")
    assert rows.first.locator("td").first.inner_text().startswith("0.300")
    page.locator("#tree-controls summary").click()
    page.locator("[data-column='baseline-k16']").set_checked(False)
    assert "baseline-k16" not in page.locator("table.tree thead th").all_inner_texts()
    rows.first.locator(".fold").click()
    assert page.locator("table.tree tbody tr").count() == 1


def test_a_group_of_arms_is_chosen_and_kept_in_the_address(visit, experiment):
    page = visit(experiment)
    assert page.locator("#training figure").first.get_attribute("data-figure").startswith("g0-")
    page.locator("[data-choose-group]", has_text="relu, k = 64").click()
    visible = page.locator("#training figure:visible")
    assert visible.first.get_attribute("data-figure").startswith("g3-")
    assert page.locator("#comparisons h3:visible").all_inner_texts()[-1] == "Differences: relu, k = 64"
    assert "group=3" in hash_of(page)
    again = visit(page.url)
    assert again.locator("#training figure:visible").first.get_attribute("data-figure").startswith("g3-")
    page.go_back()
    assert page.locator("#training figure:visible").first.get_attribute("data-figure").startswith("g0-")


def test_a_figure_tells_its_numbers(visit, experiment):
    page = visit(experiment)
    figure = page.locator("#frontiers figure").first
    figure.scroll_into_view_if_needed()
    box = figure.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    text = page.locator("#tip").inner_text()
    assert "3 seeds" in text
    assert "held-out FVU" in text
    assert re.search(r"\(0\.\d+ to 0\.\d+\)", text)
    figure = page.locator("#probing figure").first
    figure.focus()
    page.keyboard.press("ArrowLeft")
    assert "language model, full probe" in page.locator("#tip").inner_text()


def test_a_latent_outside_of_the_page_comes_from_its_file(visit, demo):
    page = visit(demo + "#variant=adaptive&latent=301")
    api.expect(page.locator("#detail h3")).to_have_text("adaptive #301")
    assert "Top contexts (2)" in page.locator("#detail").inner_text()
    page.locator("#detail dd a", has_text="#304").first.click()
    api.expect(page.locator("#detail h3")).to_have_text("adaptive #304")
    page.go_back()
    api.expect(page.locator("#detail h3")).to_have_text("adaptive #301")


def test_without_the_side_files_the_page_says_so_in_words(browser, demo, tmp_path):
    alone = tmp_path / "index.html"
    alone.write_bytes(Path(demo.removeprefix("file://")).read_bytes())
    page = browser.new_page()
    page.goto(alone.as_uri() + "#variant=adaptive&latent=301")
    said = page.locator("#detail .missing", has_text="is missing")
    said.wait_for()
    assert "latents/ belongs beside this page" in said.inner_text()
    assert page.locator("#rows .row").count() > 10
    page.locator("#all").select_option("1")
    page.locator("#problem", has_text="hafs report").wait_for()
    assert page.locator("#all").input_value() == ""
    page.locator("#rows .row").first.click()
    page.locator("#detail .context").first.wait_for()
    page.close()


def test_the_list_of_all_is_searched_and_filtered(visit, demo):
    page = visit(demo + "#variant=adaptive")
    explore(page)
    count = page.locator("#count")
    page.locator("#all").select_option("1")
    api.expect(count).to_have_text(f"{2 * LATENTS} latents")
    page.locator("#search").fill("rivers")
    api.expect(count).to_have_text(f"1 of {2 * LATENTS}")
    assert column(page, 0) == ["#21"] and column(page, 6) == ["rivers"]
    page.locator("#search").fill("#301")
    api.expect(count).to_have_text(f"1 of {2 * LATENTS}")
    page.locator("#search").fill("")
    page.locator("#least").fill("1")
    page.locator("#most").fill("2")
    api.expect(page).to_have_url(re.compile("all=1.*least=1.*most=2"))
    shown = numbers(column(page, 1))
    assert shown and all(1 <= density <= 2 for density in shown)
    again = visit(page.url)
    api.expect(again.locator("#count")).to_have_text(count.inner_text())
    page.locator("#live").select_option("silent")
    page.locator("#rows .missing").wait_for()


def test_latents_and_tables_are_downloaded(visit, demo):
    page = visit(demo + "#variant=adaptive&latent=20")
    page.locator("#detail h3").wait_for()

    def taken(button: Any) -> tuple[str, str]:
        with page.expect_download() as found:
            button.click()
        return found.value.suggested_filename, Path(found.value.path()).read_text()

    name, text = taken(page.locator("#detail button", has_text="JSON"))
    latent = json.loads(text)
    assert (name, latent["variant"], latent["latent"], latent["label"]) == (
        "adaptive-20.json",
        "adaptive",
        20,
        "kings & queens",
    )
    assert len(latent["contexts"]) == 4 and len(latent["neighbours"]) == 6 and sum(latent["histogram"]) > 0
    assert max(latent["contexts"][0]["values"]) > 5
    name, text = taken(page.locator("#arms .tools button", has_text="CSV"))
    rows = list(csv.reader(text.splitlines()))
    assert rows[0][:3] == ["arm", "FVU ↓", "L0"] and rows[1][:2] == ["baseline", "0.200"]
    assert ["strict", "0.300 (+0.100)"] in [row[:2] for row in rows]
    _, text = taken(page.locator("#list-csv"))
    assert len(text.splitlines()) == LATENTS + 1


def test_the_arms_are_sorted_and_their_heads_defined(visit, demo):
    page = visit(demo, has_touch=True)
    head = page.locator("table.variants thead button", has_text="FVU")
    head.focus()
    assert "Fraction of variance unexplained" in page.locator("#bubble").inner_text()
    head.tap()
    assert page.locator("#bubble").is_visible()
    names = page.locator("table.variants tbody th")
    falling = names.all_inner_texts()
    head.tap()
    rising = names.all_inner_texts()
    assert falling[:4] == ["strict", "baseline-relu", "adaptive", "baseline"]
    assert rising[:4] == falling[:4][::-1]
    assert falling[4:] == rising[4:] and all(name.startswith("LM") for name in falling[4:])


def test_a_legend_hides_a_curve(visit, demo):
    page = visit(demo)
    colour = "var(--s-strict)"
    figures = page.locator("#training figure")
    coloured = figures.locator(f"[style*='{colour}']")
    seen = coloured.evaluate_all(SEEN)
    assert seen > 3
    button = page.locator("#training .legend button", has_text="strict")
    button.click()
    assert coloured.evaluate_all(SEEN) == 0  # nor its values at the curves' ends
    assert figures.first.locator("[style*='var(--s-baseline)']").first.is_visible()
    figures.first.focus()
    page.keyboard.press("ArrowLeft")
    tip = page.locator("#tip")
    assert "baseline" in tip.inner_text() and "strict" not in tip.inner_text()
    assert page.locator("#dictionary").locator(f"[style*='{colour}']").first.is_visible()
    button.click()
    assert coloured.evaluate_all(SEEN) == seen


def test_every_entry_of_a_legend_hides_all_that_it_names(visit, demo, experiment):
    for url in (demo, experiment):
        page = visit(url)
        left = page.evaluate(
            """() => [...document.querySelectorAll("[data-curve]")].flatMap(button => {
              const part = button.closest("[data-group], section");
              if (part.hidden) return [];
              const name = button.dataset.curve;
              const own = [...part.querySelectorAll("figure svg *")].filter(
                one => (one.getAttribute("style") || "").includes(`var(${name})`) && !one.closest("defs"));
              button.click();
              const isOfOther = one => (one.closest("[data-of]")?.dataset.of ?? name) !== name;  // of the same colour
              const shown = own.filter(one => one.getClientRects().length && !isOfOther(one)).map(one => one.outerHTML);
              button.click();
              return part.querySelector(`[data-of="${name}"]`) ? shown : [`nothing is of ${name}`];
            })"""
        )
        assert left == []


def test_print_shows_every_section_whole(visit, demo):
    page = visit(demo, viewport={"width": 720, "height": 1000})  # the width of A4's text
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    page.locator("table.tree td").first.wait_for()
    page.locator("#detail .context").first.wait_for()
    assert page.evaluate("document.querySelectorAll('details:not([open]):not(.configs)').length") == 0
    wide = page.evaluate(
        "[...document.querySelectorAll('table')].filter(t => t.getBoundingClientRect().right > innerWidth + 1).length"
    )
    assert wide == 0
    assert page.locator("#compare .card").count() == len(RUNS) - 1
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate("document.querySelectorAll('details:not([open])').length") > 0
    page.locator("#detail .missing").wait_for()  # nor does the example stay
    page.emulate_media(media="screen")
    page.locator("#rows .row").first.click()
    page.locator("#compare").wait_for()
    assert page.locator("#compare[open]").count() == 0


@pytest.mark.slow
def test_a_thousand_latents_paint_within_a_second_and_fit_10_mb(visit, tmp_path, record_property):
    folder = make_workspace(tmp_path / "offline", RUNS)
    url = written(folder, latents=300, contexts=20)
    size = (folder / "report" / "index.html").stat().st_size
    page = visit(url)
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    explore(page)
    sort = "const start = performance.now(); document.querySelector('[data-sort=cosine]').click();"
    took = page.evaluate(f"() => {{ {sort} return performance.now() - start }}")
    page.locator("#search").fill("title 12")
    api.expect(page.locator("#count")).to_contain_text(" of 300")
    print(f"{size / 1e6:.1f} MB, first paint {paint:.0f} ms, sort {took:.0f} ms")
    for name, value in {"megabytes": size / 1e6, "first_paint_ms": paint, "sort_ms": took}.items():
        record_property(name, value)
    assert page.locator("[data-variant]").count() == 4
    assert size < 10e6
    assert paint < 1000
    assert took < 250
