"""results.json, the verdict's sentences and the report's files, from a made-up workspace of the right schemas."""

import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest

from hafs_evaluate.report.figures.draw import svg
from hafs_evaluate.report.figures.shapes import Panel, Series
from hafs_evaluate.report.figures.styles import styles_of
from hafs_evaluate.report.markdown import context_line, escape
from hafs_evaluate.report.page import script_json
from hafs_evaluate.report.report import write_report
from hafs_evaluate.report.verdict import findings, verdict
from hafs_evaluate.results.probing_means import mean_probing
from hafs_evaluate.results.results import build_results
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import write_json
from hafs_jax.runs import Run
from tests.support.report_workspace import (
    NASTY,
    ORDER,
    TASKS,
    Page,
    make_workspace,
    page_of,
    page_of_written,
    unpacked,
    write_core,
    write_domains,
    write_first_letter,
    write_hierarchy,
    write_latents,
    write_llm_probing,
    write_many_latents,
    write_probing,
    write_run,
    write_tokens,
)
from tests.support.runs import STORE, config_of


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A whole workspace with its report written; read only."""
    folder = make_workspace(tmp_path_factory.mktemp("made") / "offline")
    write_report(folder)
    return folder


def test_results_hold_every_promised_figure(made):
    results = build_results(made)
    assert results == json.loads((made / "report" / "results.json").read_text())
    named = {
        key: results[key] for key in ("format_version", "profile", "model", "hook", "rows", "heldout_rows", "d_model")
    }
    assert named == {
        "format_version": 1, "profile": "test", "model": "tiny", "hook": "blocks.0.hook_resid_post", "rows": 70,
        "heldout_rows": 40, "d_model": 6,
    }  # fmt: skip
    assert list(results["variants"]) == ORDER
    adaptive = results["variants"]["adaptive"]
    expected = {
        "run": "adaptive-s0", "architecture": "batchtopk", "seed": 0, "fvu": 0.23, "l0": 4.0, "dead_fraction": 0.0,
        "ce_score": 0.9, "kl_score": 0.95, "max_coherence": 0.9, "mean_coherence": 0.115, "tau": 0.25,
        "tau_reached": True,
    }  # fmt: skip
    assert {key: adaptive[key] for key in expected} == expected
    assert adaptive["explained_variance"] == pytest.approx(0.77)
    assert adaptive["core"]["rows"] == 40
    assert list(adaptive["probing"]) == list(TASKS)
    assert adaptive["probing"]["task_b"] == pytest.approx({"top_1": 0.72, "top_2": 0.73, "top_5": 0.76, "top_10": 0.81})
    assert adaptive["probing_auc"]["task_b"]["top_10"] == pytest.approx(0.91)
    assert list(adaptive["probing"]["task_a"]) == ["top_1", "top_2", "top_5", "top_10"]
    assert results["llm"]["probing"]["task_a"] == pytest.approx(
        {"full": 0.9, "top_1": 0.51, "top_2": 0.52, "top_5": 0.55, "top_10": 0.6}
    )
    assert results["variants"]["strict"]["tau_reached"] is None
    assert results["seconds"]["extract"] == 12.5
    assert results["seconds"]["train/adaptive-s0"] == 1.5
    assert results["seconds"]["eval/probing"] == 3.0


def test_figures_that_are_not_numbers_become_null(tmp_path):
    folder = make_workspace(tmp_path, ("baseline-s0",))
    write_core(folder, "baseline-s0", 0.2, ce_score=math.nan, kl_score=math.inf)
    values = build_results(folder)["variants"]["baseline"]
    assert (values["ce_score"], values["kl_score"], values["core"]["model"]["ce_score"]) == (None, None, None)
    write_report(folder)


def test_several_seeds_keep_their_seed_in_the_name_and_one_does_not(tmp_path):
    folder = make_workspace(tmp_path, ("baseline-s0", "adaptive-s0"))
    write_run(folder, "adaptive-s10", seed=10)
    write_run(folder, "adaptive-s2", seed=2)
    assert list(build_results(folder)["variants"]) == ["baseline", "adaptive-s0", "adaptive-s2", "adaptive-s10"]
    assert verdict(build_results(folder))[-1].startswith("One seed")
    write_run(folder, "baseline-s2", seed=2)
    write_core(folder, "baseline-s2", 0.24)
    results = build_results(folder)
    assert "baseline 0.220" in verdict(results)[0]
    assert "FVU varies between seeds by up to 0.028 (SD)" in verdict(results)[-1]
    assert results["arms"]["baseline"]["runs"] == ["baseline-s0", "baseline-s2"]


def test_an_unfinished_run_is_named_and_is_no_variant(tmp_path):
    folder = make_workspace(tmp_path, ("baseline-s0",))
    Run(folder / "runs" / "strict-s0").write_config(config_of("strict"), STORE)
    results = build_results(folder)
    assert list(results["variants"]) == ["baseline"]
    assert results["unfinished_runs"] == ["strict-s0"]
    write_report(folder)
    assert "strict-s0" in "".join(page_of(folder).texts)


def test_sparse_probings_own_schema_gives_both_sae_and_language_model(tmp_path):
    folder = make_workspace(tmp_path, ("baseline-s0",))
    (folder / "eval" / "llm" / "probing.json").unlink()
    detail = {
        "dataset_name": "bias_in_bios", "llm_test_accuracy": 0.93, "llm_top_1_test_accuracy": 0.6,
        "sae_top_10_test_accuracy": 0.9, "sae_top_2_test_accuracy": 0.8, "sae_top_5_test_accuracy": None,
        "sae_test_accuracy": None,
    }  # fmt: skip
    write_json(folder / "eval" / "baseline-s0" / "probing.json", {"eval_result_details": [detail]})
    results = build_results(folder)
    assert results["variants"]["baseline"]["probing"] == {"bias_in_bios": {"top_2": 0.8, "top_10": 0.9}}
    assert results["llm"]["probing"] == {"bias_in_bios": {"full": 0.93, "top_1": 0.6}}


def test_means_are_over_the_tasks_that_every_variant_has(tmp_path):
    folder = make_workspace(tmp_path, ("baseline-s0", "strict-s0"))
    write_probing(folder, "strict-s0", 0.7, tasks=("task_a", "task_c"))
    tasks, means = mean_probing(build_results(folder))
    assert tasks == ["task_a"]
    assert means["strict"]["top_1"] == pytest.approx(0.71)
    assert means[None]["full"] == pytest.approx(0.9)


def test_tasks_are_in_the_order_of_their_numbers(tmp_path):
    folder = make_workspace(tmp_path, ("baseline-s0",))
    write_probing(folder, "baseline-s0", 0.6, tasks=("105_b", "92_a", "ag_news"))
    assert mean_probing(build_results(folder))[0] == ["92_a", "105_b", "ag_news"]


def test_without_a_store_there_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match="no manifest, no store: run `make extract`"):
        write_report(tmp_path)


def test_the_verdict_states_the_figures(made):
    sentences = verdict(build_results(made))
    assert sentences[0] == (
        "Held-out FVU at L0 4.0: baseline 0.200, strict 0.300, adaptive 0.230; "
        "adaptive gives back 70% of what strict costs."
    )
    assert "baseline 0.100, strict 0.150, adaptive 0.115; strict and adaptive do not lower it" in sentences[1]
    assert "Top-1 probing accuracy, mean over 2 tasks: baseline 0.700, strict 0.680, adaptive 0.670" in sentences[2]
    assert "its best single activation 0.510, its full probe 0.900" in sentences[2]
    assert "adaptive is ahead of baseline on 0 of 2 and behind on 2" in sentences[2]
    assert sentences[3] == "One seed: a difference under the noise between reseeded runs is not resolved here."


def test_the_verdict_says_cost_then_effect_then_what_is_not_resolved(tmp_path):
    folder = make_workspace(tmp_path, ("baseline-s0", "adaptive-s0"))
    write_tokens(folder, "baseline-s0", 0.781)
    write_tokens(folder, "adaptive-s0", 0.823)
    found = findings(build_results(folder))
    assert [finding.kind for finding in found] == ["cost", "effect", "effect", "open", "open"]
    assert found[0].text.startswith("Held-out FVU")
    assert found[1].text == (
        "Transfer of the best latent to unseen tokens, balanced accuracy: baseline 0.781, adaptive 0.823 "
        "(the language model's own probe: 0.987); F1: baseline 0.432, adaptive 0.432."
    )
    assert [text for is_bold, text in found[1].parts() if is_bold] == ["0.781", "0.823"]  # the headline alone
    assert all("".join(text for _, text in finding.parts()) == finding.text for finding in found)
    page = page_of_written(folder)
    shown = [value for tag, name, value in page.attributes if (tag, name) == ("li", "class")]
    assert shown[:5] == ["cost", "effect", "effect", "open", "open"]
    assert "".join(page.texts).index("Cost") < "".join(page.texts).index("Not resolved")
    assert "**Not resolved:** Top-1" in (folder / "report" / "report.md").read_text()


@pytest.mark.parametrize(
    ("strict", "adaptive", "said"),
    [
        (0.19, 0.25, "strict costs nothing here"),
        (0.30, 0.20, "adaptive gives back all of what strict costs"),
        (0.30, 0.31, "adaptive costs no less than strict"),
    ],
)
def test_the_verdict_does_not_flatter(tmp_path, strict, adaptive, said):
    folder = make_workspace(tmp_path, ("baseline-s0", "strict-s0", "adaptive-s0"))
    write_core(folder, "strict-s0", strict)
    write_core(folder, "adaptive-s0", adaptive)
    assert said in verdict(build_results(folder))[0]


def test_the_verdict_warns_of_an_inactive_gate_and_of_unequal_sparsity(tmp_path):
    folder = make_workspace(tmp_path, ("baseline-s0", "strict-s0", "adaptive-s0"))
    write_core(folder, "strict-s0", 0.3, l0=5.0)
    write_run(folder, "adaptive-s0", tau_reached=False)
    said = " ".join(verdict(build_results(folder)))
    assert "adaptive: its error never fell to tau = 0.250; the soft gate left lambda at 0.40." in said
    write_run(folder, "adaptive-s0", tau_reached=False, final={"lambda": 0.01})
    said = " ".join(verdict(build_results(folder)))
    assert "adaptive is inactive: its error never reached tau = 0.250" in said
    assert "L0 differs by more than 5%" in said
    write_report(folder)
    assert "0.250 never reached" in "".join(page_of(folder).texts)


def test_many_inactive_gates_are_one_sentence(tmp_path):
    folder = make_workspace(tmp_path, ("baseline-s0",))
    for seed in range(4):
        write_run(folder, f"adaptive-s{seed}", seed, tau_reached=seed == 0, final={"lambda": 0.1 * seed})
    said = [sentence for sentence in verdict(build_results(folder)) if sentence.startswith("adaptive:")]
    assert said == ["adaptive: the error of 3 of 4 seeds never fell to tau; the soft gate left lambda at 0.10 to 0.30."]


def test_the_report_shows_every_variant_and_every_part(made):
    page = page_of(made)
    text = "".join(page.texts)
    figures = page.json("data-figures")
    assert [page.json(f"data-latents-{number}")["name"] for number in range(len(ORDER))] == ORDER
    assert {
        "loss",
        "fvu_ema",
        "l0",
        "alpha",
        "lambda",
        "coherence_mean",
        "probing-mean",
        "density",
        "coherence",
    } <= set(figures)
    drawn = [value for tag, name, value in page.attributes if (tag, name) == ("figure", "data-figure")]
    assert sorted(drawn) == sorted(figures)
    for curves in figures.values():
        assert curves["series"]
    for name in ORDER:
        assert text.count(name) >= 3
        assert f"### {name}" in (made / "report" / "report.md").read_text().replace("\\", "")
    for sentence in verdict(build_results(made)):
        assert sentence in text
    for value in ("0.230", "+0.030", "0.680", "0.250 reached", "no gate"):
        assert value in text


def test_the_report_loads_nothing(made):
    text = (made / "report" / "index.html").read_text()
    page = Page(text)
    for tag, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            assert value.startswith(("#", "data:,")), (tag, name, value)
    assert not {"iframe", "img", "object", "embed", "base"} & set(page.tags)
    assert [value for tag, name, value in page.attributes if (tag, name) == ("link", "rel")] == ["icon"]
    assert "default-src 'none'" in text
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert len(text) < 5e6


def test_nasty_tokens_are_shown_and_never_run(tmp_path):
    folder = make_workspace(tmp_path, ("baseline-s0",))
    before = page_of_written(folder)
    write_latents(folder, "baseline-s0", NASTY)
    write_probing(folder, "baseline-s0", 0.6, tasks=("</script><b>$x$", "task_b"))
    write_llm_probing(folder, ("</script><b>$x$", "task_b"))
    after = page_of_written(folder)
    assert before.tags.count("script") == after.tags.count("script") == 8
    assert "b" not in after.tags
    assert unpacked(after)[0]["contexts"][0]["tokens"] == NASTY
    assert "</script><b>$x$" in "".join(after.texts)
    written = (folder / "report" / "report.md").read_text()
    assert "<b>" not in written
    assert "\u202e" not in written


def test_script_json_keeps_its_strings_and_ends_no_script():
    text = script_json(NASTY)
    assert json.loads(text) == NASTY
    assert not set("<>&\u2028\u2029") & set(text)


def test_markdown_shows_text_literally_and_the_peak_in_bold():
    context = {"tokens": ["a|", " *b* ", "<c>"], "peak": 1}
    assert context_line(context) == "a\\| **\\*b\\*** &lt;c&gt;"
    assert context_line({"tokens": ["a", "  ", "b"], "peak": 1}) == "a**`  `**b"
    assert escape("x_y\nz") == "x\\_y↵z"


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        (["core.json"], "Reconstruction was not evaluated."),
        (["probing.json"], "Sparse probing was not evaluated."),
        (["latents.json"], "Single latents were not evaluated."),
        (["core.json", "probing.json", "latents.json"], "not evaluated"),
    ],
)
def test_what_is_missing_is_said_to_be_not_evaluated(tmp_path, gone, said):
    folder = make_workspace(tmp_path, ("baseline-s0", "adaptive-s0"))
    for name in gone:
        for path in folder.glob(f"eval/*/{name}"):
            path.unlink()
    page = page_of_written(folder)
    assert said in "".join(page.texts)
    assert said in (folder / "report" / "report.md").read_text()
    assert "not evaluated" in "".join(page.texts)


def test_a_store_alone_makes_a_report(tmp_path):
    folder = make_workspace(tmp_path, ())
    for path in [*folder.glob("eval/**/*.json"), *folder.glob("store/heldout/*")]:
        path.unlink()
    (folder / "store" / "heldout").rmdir()
    text = "".join(page_of_written(folder).texts)
    assert "No run has finished training" in text
    assert json.loads((folder / "report" / "results.json").read_text())["variants"] == {}


def test_equal_workspaces_give_equal_bytes(made, tmp_path, drawn_once):
    again = make_workspace(tmp_path / "elsewhere" / made.name)
    for path in made.rglob("*.json"):  # the page says the day of the newest result
        if (again / path.relative_to(made)).exists():
            os.utime(again / path.relative_to(made), ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    drawn_once.clear()
    write_report(again)
    first = sorted(path.relative_to(made) for path in (made / "report").rglob("*") if path.is_file())
    assert {"index.html", "report.md", "results.json", "overview.png"} <= {path.name for path in first}
    for path in first:
        assert (made / path).read_bytes() == (again / path).read_bytes(), path


def test_the_markdown_figures_exist(made):
    text = (made / "report" / "report.md").read_text()
    linked = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert len(linked) == 5
    for path in linked:
        assert (made / "report" / path).read_bytes().startswith(b"\x89PNG")


def test_a_panels_numbers_lie_where_they_are_drawn():
    series = [Series("baseline", "baseline", [1.0, 10.0, 100.0], [0.2, 0.4, 0.8])]
    panel = Panel("p", "P <&>", "x", "y", series, [("adaptive", "tau", 0.5)], x_log=True, y_limits=(0.0, 1.0))
    text, hover = svg(panel, styles_of({name: {"variant": name} for name in ("baseline", "adaptive")}))
    assert text.startswith("<svg role=")
    assert "P &lt;&amp;&gt;" in text
    assert "var(--s-baseline)" in text
    assert "var(--s-adaptive)" in text
    assert not re.search(r"#[0-9a-f]{6}", re.sub(r"url\([^)]*\)|href=\"[^\"]*\"", "", text))
    point = r"([\d.]+) ([\d.]+) \n"
    path = re.search(rf'<path d="M {point}L {point}L {point}" clip-path="[^"]*" style="[^"]*--s-baseline', text)
    drawn = np.array(path.groups(), float).reshape(3, 2)
    x0, y0, x1, y1 = hover["box"]
    low, high, _ = hover["x"]
    across = np.log(np.array([1, 10, 100]) / low) / np.log(high / low)
    np.testing.assert_allclose(drawn[:, 0], x0 + across * (x1 - x0), atol=0.05)
    np.testing.assert_allclose(drawn[:, 1], y1 - np.array([0.2, 0.4, 0.8]) * (y1 - y0), atol=0.05)


def test_domains_and_first_letters_are_shown_wherever_results_are(tmp_path):
    folder = make_workspace(tmp_path, ("baseline-s0", "adaptive-s0"))
    write_domains(folder, "baseline-s0", 0.7)
    write_domains(folder, "adaptive-s0", 0.8)
    write_first_letter(folder, "baseline-s0", 0.31)
    write_first_letter(folder, "adaptive-s0", 0.12, "found 135 million parameters")
    page, written = page_of_written(folder), (folder / "report" / "report.md").read_text().replace("\\", "")
    text = "".join(page.texts)
    for shown in (text, written):
        for figure in ("0.850", "0.800", "0.900", "0.31", "not valid: found 135 million", "120 documents of"):
            assert figure in shown, figure
        assert "an F1 of 0.462" in shown
    assert "#3 0.80, #5 0.70, #7 0.60" in written
    assert "- top-k domain F1: F1 of k latents as a detector" in written
    kept = json.loads((folder / "report" / "results.json").read_text())
    adaptive = kept["variants"]["adaptive"]
    assert adaptive["domains"]["sources"]["biology"]["best_1"]["f1"] == 0.8
    assert "latents" not in adaptive["domains"]["sources"]["biology"]
    assert adaptive["first_letter"]["valid"] is False
    assert adaptive["measures"]["domain_f1_5"] == pytest.approx(0.9)
    assert "first_letter_absorption" not in adaptive["measures"]
    assert kept["arms"]["baseline"]["measures"]["first_letter_absorption"]["mean"] == 0.31
    assert "first-letter" in {value for _, name, value in page.attributes if name == "id"}


def test_transfer_to_unseen_tokens_is_shown_with_its_ceiling_and_its_floors(tmp_path):
    folder = make_workspace(tmp_path, ("baseline-s0", "adaptive-s0"))
    write_tokens(folder, "baseline-s0", 0.781)
    write_tokens(folder, "adaptive-s0", 0.823)
    page, written = page_of_written(folder), (folder / "report" / "report.md").read_text().replace("\\", "")
    text = "".join(page.texts)
    for shown in (text, written):
        for figure in (
            "0.781",
            "0.823",
            "0.843",
            "0.333",
            "0.987",
            "0.654",
            "LM, own probes",
            "LM, neurons",
            "LM, PCA",
        ):
            assert figure in shown, figure
        assert "2 properties count on 12,345 held-out rows: months, digits." in shown
        assert "unseen tokens, top-1" in shown  # the column of the table of arms
    assert "| LM, own probes | 0.987 |  |  |  | 0.980 |" in written
    assert "- unseen tokens, top-k: Transfer to unseen tokens" in written
    assert "tokens" in {value for _, name, value in page.attributes if name == "id"}
    kept = json.loads((folder / "report" / "results.json").read_text())
    tokens = kept["variants"]["adaptive"]["tokens"]
    assert {name: tokens[name] for name in ("transfer_top_1", "transfer_top_2", "transfer_top_5")} == {
        "transfer_top_1": 0.823, "transfer_top_2": pytest.approx(0.833), "transfer_top_5": pytest.approx(0.843),
    }  # fmt: skip
    assert (tokens["recall"], tokens["absorbed"]) == (0.6, 0.333)
    assert kept["variants"]["adaptive"]["measures"]["transfer_top_5"] == pytest.approx(0.843)
    assert kept["variants"]["adaptive"]["measures"]["transfer_f1_1"] == 0.432
    assert kept["arms"]["adaptive"]["measures"]["token_absorbed"]["mean"] == 0.333
    assert kept["llm"]["tokens"]["ceiling"] == {"mean": {"transfer_top_1": 0.987, "recall": 0.98}}


def test_every_number_of_the_core_metrics_is_on_the_page(made):
    text = "".join(page_of(made).texts)
    for path, value in (("geometry.frobenius_excess", "0.1"), ("sparsity.n_latents", "13"), ("model.kl_score", "0.95")):
        assert path in text and value in text
    assert "by_source.text" not in text


def test_what_was_not_looked_at_has_no_section(made):
    text = (made / "report" / "index.html").read_text() + (made / "report" / "report.md").read_text()
    for part in ('id="domains"', 'id="first-letter"', 'id="tokens"', "## Domains", "## Tokens", "First-letter"):
        assert part not in text


def test_trees_left_out_and_saes_off_their_level_are_named(tmp_path):
    folder = make_workspace(tmp_path, ("baseline-s0",))
    write_hierarchy(folder, "baseline-s0", 0.7)
    path = folder / "eval" / "baseline-s0" / "hierarchy.json"
    found = json.loads(path.read_text())
    found["trees"]["professions"] |= {"in_training": 1234, "ambiguous": 0, "dropped": {"people/poet": 7}}
    write_json(path, {**found, "skipped": {"places": "under two leaves"}})
    summary = {"saes": 3, "config": {"l0_margin": 0.02}, "off_level": {"a": 17.0}, "missing": ["b"], "comparisons": []}
    write_json(folder / "experiment" / "summary.json", {**summary, "falsifiers": [{"name": "x", "outcome": "pass"}]})
    shown = "".join(page_of_written(folder).texts), (folder / "report" / "report.md").read_text().replace("\\", "")
    for text in shown:
        assert "Trees left out: places (under two leaves)." in text
        left_out = "1,234 texts in the training documents; classes with too few texts: people/poet"
        assert f"Left out of professions: {left_out}." in text
        assert "1 of 4 SAEs (a) is off their L0 level by more than 2%." in text
        assert "1 of 4 SAEs (b) is not measured." in text


def test_the_head_of_the_silent_latents_says_on_how_many_rows(made):
    text = "".join(page_of(made).texts)
    assert "silent on 40 held-out rows" in text
    assert "Dead in training" in (made / "report" / "index.html").read_text()
    assert "silent on 40 held-out rows" in (made / "report" / "report.md").read_text()


def test_the_page_says_what_it_is_when_and_by_which_command(made):
    page = page_of(made)
    text = "".join(page.texts)
    assert "offline: 5 SAEs of tiny, blocks.0.hook_resid_post" in text
    assert "hafs report --profile offline" in text
    assert re.search(r"Measured on \d+ [A-Z][a-z]+ \d{4}", text)


def test_each_property_of_tokens_has_a_row(tmp_path):
    folder = make_workspace(tmp_path, ("baseline-s0", "adaptive-s0"))
    write_tokens(folder, "baseline-s0", 0.781)
    write_tokens(folder, "adaptive-s0", 0.823)
    page = page_of_written(folder)
    text = "".join(page.texts)
    assert "Each property (2)" in text
    table = text[text.index("Each property (2)") :]
    assert re.search(r"digits\s*0\.781F1 0\.500\s*0\.823F1 0\.500", table)


def test_classes_that_repeat_anothers_figures_are_noted_and_counted(tmp_path):
    folder = make_workspace(tmp_path, ("baseline-s0",))
    write_hierarchy(folder, "baseline-s0", 0.7)
    path = folder / "eval" / "baseline-s0" / "hierarchy.json"
    values = json.loads(path.read_text())
    nodes = values["trees"]["professions"]["nodes"]
    nodes["people/arts"]["texts"] = nodes["people/arts/actor"]["texts"]
    nodes["people/arts"]["contrasts"]["rest"]["top_1"]["balanced_accuracy"] = 0.1
    nodes["people/sport"]["texts"] = 600
    path.write_text(json.dumps(values))
    write_report(folder)
    note = (
        "Means of professions leave out 1 of 2 parents: arts has actor as its only child, of the same texts, and is"
        " left out. sport and arts are complements in people, so their probes are equal and count once."
    )
    assert note in "".join(page_of(folder).texts)
    assert note in (folder / "report" / "report.md").read_text()
    results = json.loads((folder / "report" / "results.json").read_text())
    assert results["variants"]["baseline"]["measures"]["hierarchy_parent_top_1"] == pytest.approx(0.7)
    assert results["variants"]["baseline"]["hierarchy"]["trees"]["professions"]["left_out"] == ["people/arts"]


def test_a_bad_file_of_labels_is_one_error(tmp_path):
    folder = make_workspace(tmp_path, ("baseline-s0",))
    (folder / "labels.csv").write_text("variant,latent,label\nbaselin,3,x\n")
    with pytest.raises(UserError, match=r"labels\.csv, line 2: no run or arm 'baselin'"):
        write_report(folder)
    (folder / "labels.csv").write_text("variant,latent,label\nbaseline,3,</script> fox\n")
    assert page_of_written(folder).json("data-labels") == {"baseline": {"3": ["</script> fox", "", None]}}


def test_latents_that_are_not_in_the_page_lie_in_side_files(tmp_path):
    folder = make_workspace(tmp_path, ("baseline-s0", "adaptive-s0"))
    write_many_latents(folder, "baseline-s0", 300, 3, others=True)
    write_report(folder)
    side = page_of(folder).json("data-side")
    assert set(side) == {"baseline"}
    starts, lengths = side["baseline"]["indices"][::2], side["baseline"]["indices"][1::2]
    assert (starts, lengths) == (list(range(1, 600, 2)), [1] * 300)
    files = {path.name: path.read_text() for path in (folder / "report" / "latents").iterdir()}
    name = side["baseline"]["name"]
    assert set(files) == {f"{name}-{part}.js" for part in ("list", 0, 1, 2)}
    part = json.loads(re.fullmatch(r"hafsLatents\(\"[^\"]+\", (.*)\);\n", files[f"{name}-1.js"], re.DOTALL)[1])
    assert part["columns"]["index"] == list(range(257, 512, 2))
    assert not any("</" in text or "\u2028" in text for text in files.values())
    write_many_latents(folder, "baseline-s0", 300, 3, seed=1, others=True)
    write_report(folder)  # what an earlier report left is gone, and other contents have another name
    assert not set(files) & {path.name for path in (folder / "report" / "latents").iterdir()}
    (folder / "eval" / "baseline-s0" / "latents_others.json").unlink()
    write_report(folder)
    assert not (folder / "report" / "latents").exists()
