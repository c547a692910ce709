"""Arms over seeds: names, intervals, frontiers, trees, comparisons, and what of the latents is embedded."""

import json
import math
from itertools import combinations
from pathlib import Path

import pytest

from hafs_evaluate.report import embedded
from hafs_evaluate.report.embedded import chosen_runs, embed
from hafs_evaluate.report.figures.frontiers import frontier_panels
from hafs_evaluate.report.figures.panels import latent_panels, probing_panels, training_panels
from hafs_evaluate.report.figures.styles import STYLES, SYMBOLS, styles_of
from hafs_evaluate.report.report import write_report
from hafs_evaluate.report.tables import comparison_groups, falsifiers
from hafs_evaluate.report.tree_view import tree_data
from hafs_evaluate.report.verdict import verdict
from hafs_evaluate.results.arms import build_arms, compared, estimate, groups
from hafs_evaluate.results.results import build_results
from hafs_jax.base.files import read_json
from hafs_jax.runs import Run
from tests.support.report_workspace import (
    ARM_VARIANTS,
    ORDER,
    Page,
    make_experiment,
    make_workspace,
    page_of,
    page_of_written,
    unpacked,
    write_core,
    write_hierarchy,
    write_latents,
    write_many_latents,
    write_run,
)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Path:
    """Nine variants on two architectures at two ks, three seeds each, with its report; read only."""
    folder = make_experiment(tmp_path_factory.mktemp("experiment") / "offline")
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def results(experiment):
    return build_results(experiment)


def test_an_estimate_is_students_t_interval():
    one = estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (one.mean, one.sd) == (3.0, pytest.approx(math.sqrt(2.5)))
    half = 2.776445 * math.sqrt(2.5) / math.sqrt(5)  # t(.975, 4) from a printed table
    assert (one.low, one.high) == (pytest.approx(3 - half, abs=1e-6), pytest.approx(3 + half, abs=1e-6))
    two = estimate([1.0, 2.0])
    assert (two.mean, two.sd, two.low, two.high) == (1.5, pytest.approx(math.sqrt(0.5)), None, None)
    assert vars(estimate([0.5])) == {"mean": 0.5, "sd": None, "low": None, "high": None, "values": [0.5]}


def test_seeds_are_taken_together_by_architecture_variant_and_k(results):
    arms = results["arms"]
    assert len(arms) == 40
    assert list(arms)[:4] == ["baseline-k16", "strict-k16", "adaptive-k16", "yielding-k16"]
    arm = arms["adaptive-relu-k64"]
    assert (arm["architecture"], arm["variant"], arm["k"], arm["tag"], arm["seeds"]) == (
        "relu",
        "adaptive",
        64,
        "",
        [0, 1, 2],
    )
    values = [results["variants"][run]["fvu"] for run in arm["runs"]]
    assert len(set(values)) == 3
    assert arm["measures"]["fvu"] == vars(estimate(values))
    assert arm["measures"]["fvu"]["low"] < arm["measures"]["fvu"]["mean"] < arm["measures"]["fvu"]["high"]
    for measure in ("l0", "ce_score", "top_1", "top_5", "hierarchy_parent_top_1", "hole", "absorption_fraction"):
        assert len(arm["measures"][measure]["values"]) == 3, measure


def test_stability_is_read_from_the_file_of_all_runs(results):
    assert results["arms"]["adaptive-k16"]["measures"]["stability"]["values"] == [0.6, 0.61, 0.62]
    assert "stability" not in results["arms"]["adaptive-k64"]["measures"]


def test_an_arms_name_holds_only_what_tells_it_apart(tmp_path):
    folder = make_workspace(tmp_path, ())
    for run in ("baseline-s0", "baseline-relu-s0"):
        write_run(folder, run, k=40)
    for seed in (0, 1):
        write_run(folder, f"adaptive-s{seed}-lam=1", seed, k=40, tag="lam=1")
    assert list(build_results(folder)["arms"]) == ["baseline", "adaptive", "baseline-relu"]
    write_run(folder, "adaptive-s0-lam=3", k=40, tag="lam=3")
    write_run(folder, "baseline-s0-k=16", k=16, tag="k=16")
    results = build_results(folder)
    arms = results["arms"]
    assert list(arms) == ["baseline-k16", "baseline", "adaptive-lam=1", "adaptive-lam=3", "baseline-relu"]
    assert arms["adaptive-lam=1"]["seeds"] == [0, 1]
    assert arms["adaptive-lam=1"]["measures"] == {}
    assert [(arm["arm"], arm["tag"]) for arm in arms.values()][1:3] == [("baseline", ""), ("adaptive lam=1", "lam=1")]
    variant = results["variants"]["baseline-s0-k=16"]
    assert (variant["k"], variant["tag"], variant["arm"]) == (16, "k=16", "baseline")


def test_seeds_that_say_the_same_arm_are_one_whatever_their_names(tmp_path):
    folder = make_workspace(tmp_path, ())
    write_run(folder, "adaptive-s0-x", k=40, tag="x", arm="adaptive lam=1 penalty.yielding=rarer")
    write_run(folder, "adaptive-s1-y", 1, k=40, tag="y", arm="adaptive lam=1 penalty.yielding=rarer")
    write_run(folder, "adaptive-s0", k=40)
    arms = build_results(folder)["arms"]
    assert {name: arm["runs"] for name, arm in arms.items()} == {
        "adaptive": ["adaptive-s0"],
        "adaptive-lam=1,penalty.yielding=rarer": ["adaptive-s0-x", "adaptive-s1-y"],
    }


def test_many_arms_are_drawn_by_architecture_and_k_and_few_together(results, tmp_path):
    grouped = groups(results["arms"])
    assert list(grouped) == ["batchtopk, k = 16", "batchtopk, k = 64", "relu, k = 16", "relu, k = 64"]
    assert {len(names) for names in grouped.values()} == {10}
    assert compared(results["arms"]) == ("batchtopk", 16)
    few = build_results(make_workspace(tmp_path))["arms"]
    assert groups(few) == {"all": list(few)}


def test_arms_on_shared_axes_never_look_alike(results, tmp_path):
    few = build_results(make_workspace(tmp_path))["arms"]
    for arms, names in [(few, list(few)), *((results["arms"], own) for own in groups(results["arms"]).values())]:
        styles = styles_of(arms)
        for a, b in combinations([*names, "llm-full", "llm-top-k", "llm-pca"], 2):
            assert styles[a].colour != styles[b].colour, (a, b)
            assert (styles[a].dashes, styles[a].marker) != (styles[b].dashes, styles[b].marker), (a, b)
    styles = styles_of(results["arms"])
    assert styles["adaptive-k16"] == styles["adaptive-relu-k64"] == STYLES["adaptive"]
    assert set(ARM_VARIANTS) == set(STYLES)
    assert {style.marker for style in styles.values()} <= set(SYMBOLS)


def test_frontiers_have_a_point_an_arm_with_bars_both_ways(results):
    panels = {panel.key: panel for panel in frontier_panels(results)}
    assert set(panels) == {
        f"{key}-{a}" for key in ("fvu-absorption", "fvu-hole", "fvu-l0") for a in ("batchtopk", "relu")
    }
    panel = panels["fvu-absorption-relu"]
    assert panel.scatter
    assert [series.label for series in panel.series] == list(
        dict.fromkeys(arm["variant"] for arm in results["arms"].values())
    )
    series = next(series for series in panel.series if series.label == "strict")
    arms = [results["arms"][name]["measures"] for name in ("strict-relu-k16", "strict-relu-k64")]
    assert series.x == [arm["fvu"]["mean"] for arm in arms]
    assert series.y == [arm["absorption_fraction"]["mean"] for arm in arms]
    assert series.x_interval == ([arm["fvu"]["low"] for arm in arms], [arm["fvu"]["high"] for arm in arms])
    assert series.y_interval[1] == [arm["absorption_fraction"]["high"] for arm in arms]
    assert series.notes == ["k = 16, 3 seeds", "k = 64, 3 seeds"]


def test_curves_of_several_seeds_are_means_with_intervals(results, experiment):
    names = groups(results["arms"])["batchtopk, k = 16"]
    mean, per_task = probing_panels(results, names)
    strict = next(series for series in mean[0].series if series.key == "strict-k16")
    top_1 = results["arms"]["strict-k16"]["measures"]["top_1"]
    assert (strict.y[0], strict.y_interval[0][0], strict.y_interval[1][0]) == (
        top_1["mean"],
        top_1["low"],
        top_1["high"],
    )
    assert all(series.y_interval for panel in per_task for series in panel.series if not series.key.startswith("llm"))
    assert {"llm-top-k"} == {series.key for series in mean[0].series if series.key not in results["arms"]}
    lines = {name: Run(experiment / "runs" / values["run"]).metrics() for name, values in results["variants"].items()}
    own = results["arms"]["strict-k16"]["runs"]
    for step, line in enumerate(lines[own[0]]):
        line["alpha"] = 0.2 + 0.01 * step
    panels = {panel.key: panel for panel in training_panels(lines, results, names)}
    alpha = next(series for series in panels["alpha"].series if series.key == "strict-k16")
    assert alpha.y[0] == pytest.approx((0.2 + 0.5 + 0.5) / 3)
    assert alpha.y_interval[0][0] < alpha.y[0] < alpha.y_interval[1][0]
    assert {"loss", "fvu_ema", "alpha", "lambda"} <= set(panels)


def test_histograms_are_means_over_seeds():
    density = [[0.0, 0.01, 0.01, 0.1], [0.0, 0.0, 0.01, 0.1], [0.0, 0.0, 0.0, 0.1]]
    panels = latent_panels({"baseline": [{"rows_scanned": 1000, "density": values} for values in density]})
    series = panels[0].series[0]
    assert [panel.key for panel in panels] == ["density"]
    assert series.y[0] == pytest.approx(0.5)  # never fired: 1, 2 and 3 of four
    assert sum(series.y) == pytest.approx(1)
    assert series.y_interval[0][0] < 0.5 < series.y_interval[1][0]


def test_the_tree_keeps_its_order_and_its_means(results):
    data = tree_data(results)
    assert [node["path"] for node in data["trees"]["professions"]] == [
        "people", "people/arts", "people/arts/actor", "people/sport",
    ]  # fmt: skip
    assert data["ks"] == [1, 5]
    assert [column["name"] for column in data["columns"]][-3:] == ["LM full probe", "LM top-k", "LM PCA"]
    values = data["values"]["professions"]["strict-k16"]
    one = estimate(
        [
            results["variants"][run]["hierarchy"]["macro"]["parents_top_1"]
            for run in results["arms"]["strict-k16"]["runs"]
        ]
    )
    assert values["rest/1/balanced_accuracy"][2] == [round(1000 * one.mean), round(500 * (one.high - one.low))]
    assert values["siblings/1/balanced_accuracy"][0] is None
    assert values["hole"] == [[300, 0], [300, 0], None, None]
    assert data["values"]["professions"]["LM full probe"]["rest/5/auroc"][0] == [900, 20]


def test_one_seeds_uncertainty_is_that_of_its_folds(tmp_path):
    folder = make_workspace(tmp_path, ("baseline-s0",))
    assert tree_data(build_results(folder)) is None
    write_hierarchy(folder, "baseline-s0", 0.62)
    values = tree_data(build_results(folder))["values"]["professions"]["baseline"]
    assert values["rest/1/balanced_accuracy"][0] == [620, 10]
    assert values["hole"][0] == 300


def test_the_experiments_verdict_and_tests_lead_the_page_and_the_markdown(experiment, results):
    said = ["Adaptive lowers the hole by 0.031.", "It costs 0.05 of FVU.", "One of three claims fell."]
    assert verdict(results)[:3] == said
    text = "".join(page_of(experiment).texts)
    written = (experiment / "report" / "report.md").read_text().replace("\\", "")
    for place in (text, written):
        for sentence in [*said, "gate adds to ramp", "CI holds 0", "adaptive − baseline", "+0.030 to +0.070"]:
            assert sentence in place, sentence
        for mark in (
            "▲ better",
            "▼ worse",
            "○ not resolved",
            "≈ non-inferior",
            "✗ triggered",
            "✓ pass",
            "○ not decided",
        ):
            assert mark in place.replace("**", ""), mark
    assert text.index(said[0]) < text.index("Figures are means over seeds.")
    assert written.index(said[0]) < written.index("## Arms")
    assert "± 0.0" in written
    assert "figures/frontiers.png" in written
    assert "frozen_decoder-relu-k64" in written
    assert "people" in written
    assert (experiment / "report" / "figures" / "frontiers.png").read_bytes().startswith(b"\x89PNG")


def test_primaries_are_compared_first(results):
    blocks = comparison_groups(results)
    assert [block["title"] for block in blocks] == list(groups(results["arms"]))
    measures = blocks[0]["measures"]
    assert [one["name"] for one in measures] == ["parent probing", "hole", "FVU", "stability"]
    assert [one["is_primary"] for one in measures] == [True, True, True, False]
    low, high = measures[0]["limits"]
    assert all(low <= row["low"] <= row["difference"] <= row["high"] <= high for row in measures[0]["rows"])


def test_the_arms_table_shows_intervals_and_seeds(experiment):
    text = (experiment / "report" / "report.md").read_text().replace("\\", "")
    row = next(line for line in text.splitlines() if line.startswith("| strict-k16"))
    assert row.split("|")[2].strip() == "3"
    assert "(± 0.0" in row


def test_contexts_survive_the_packing(tmp_path):
    folder = make_workspace(tmp_path, ("baseline-s0", "strict-s0"))
    write_many_latents(folder, "strict-s0", latents=5, contexts=7)
    page = page_of_written(folder)
    for number, run in enumerate(("baseline-s0", "strict-s0")):
        latents = read_json(folder / "eval" / run / "latents.json", "latents")["latents"]
        found = unpacked(page, number)
        assert len(found) == len(latents)
        for latent, back in zip(latents, found, strict=True):
            for kind in ("contexts", "random_contexts"):
                assert len(back[kind]) == len(latent.get(kind, []))
                for context, other in zip(latent.get(kind, []), back[kind], strict=True):
                    for key in ("source", "document", "title", "peak", "tokens"):
                        assert context[key] == other[key]
                    # Thousandths of the largest activation, and never 0 where the latent fires.
                    assert other["values"] == pytest.approx(context["values"], abs=1e-3 * 6)
                    assert [value > 0 for value in other["values"]] == [value > 0 for value in context["values"]]


def test_what_else_an_entry_holds_is_a_column_or_a_relation(tmp_path):
    folder = make_workspace(tmp_path, ("baseline-s0", "strict-s0"))
    write_many_latents(folder, "baseline-s0", latents=5, contexts=2)
    page = page_of_written(folder)
    record = page.json("data-latents-0")
    assert list(record["columns"]) == ["index", "density", "max_activation", "cosine", "purity", "selectivity"]
    assert all(0 <= value <= 1 for value in record["columns"]["selectivity"])
    assert record["selective_for"][0] == ["topic", "Arts", 0.5, 0.1]
    assert record["partners"][0] == [[2, 2.5]]
    assert record["partners_by"] == "pmi"
    assert record["shares_with"][0] == [[2, 0.4, "child"], [1, 0.3, "peer"]]
    assert record["matches"][0] == {"strict": [2, 0.91]}
    assert not {"partners", "shares_with", "matches"} & set(page.json("data-latents-1"))


def test_one_seed_an_arm_is_embedded_those_compared_first(results, experiment):
    chosen = chosen_runs(results["arms"], results["variants"])
    assert list(chosen)[:3] == ["baseline-k16", "strict-k16", "adaptive-k16"]
    assert chosen["strict-k16"] == "strict-s0-k=16"
    assert list(chosen)[8:10] == ["frozen_decoder-k16", "random_init-k16"]
    page = page_of(experiment)
    names = [page.json(name)["name"] for name in page.scripts if name.startswith("data-latents")]
    assert names == list(chosen)[:8]
    text = "".join(page.texts)
    assert "Left out, to keep the page small: frozen_decoder-k16" in text
    without = chosen_runs(results["arms"], [name for name in results["variants"] if "s0" not in name])
    assert without["strict-k16"] == "strict-s1-k=16"


def test_what_does_not_fit_the_page_is_left_out_and_said(tmp_path, monkeypatch):
    folder = make_workspace(tmp_path, ("baseline-s0", "strict-s0", "adaptive-s0"))
    monkeypatch.setattr(embedded, "MAX_BYTES", 900)
    page = page_of_written(folder)
    assert "data-latents-1" in page.scripts
    assert "data-latents-2" not in page.scripts
    assert "Left out, to keep the page small: adaptive." in "".join(page.texts)


def test_a_summary_without_runs_of_its_own_still_makes_a_report(tmp_path):
    folder = make_workspace(tmp_path, ("baseline-s0",))
    path = folder / "experiment" / "summary.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"arms": None, "comparisons": [], "falsifiers": [], "verdict": []}))
    page = page_of_written(folder)
    assert isinstance(page, Page)
    assert "Held-out FVU" in "".join(page.texts)
    write_latents(folder, "baseline-s0")
    write_core(folder, "baseline-s0", 0.21)
    assert build_arms(build_results(folder))["baseline"]["measures"]["fvu"]["mean"] == 0.21
    strings, records = embed({}, {})
    assert (strings, records) == ([], [])


def test_results_json_has_the_trees_means_and_not_each_class(experiment, results):
    kept = json.loads((experiment / "report" / "results.json").read_text())
    name = "strict-s0-k=16"
    assert kept["arms"] == results["arms"]
    assert [one["name"] for one in falsifiers(results)] == ["relu, error-adaptive", "frozen", "hierarchy"]
    assert len(kept["experiment"]["falsifiers"]) == 3
    own = results["variants"][name]["hierarchy"]
    assert kept["variants"][name]["hierarchy"]["macro"] == own["macro"]
    assert own["trees"]["professions"]["nodes"]
    assert "nodes" not in kept["variants"][name]["hierarchy"]["trees"]["professions"]
    assert kept["llm"]["hierarchy"]["trees"]["professions"]["levels"] == 3


def test_few_arms_share_one_frontier(tmp_path):
    panels = frontier_panels(build_results(make_workspace(tmp_path)))
    assert [panel.key for panel in panels] == ["fvu-l0"]
    assert [series.label for series in panels[0].series] == ORDER
    assert panels[0].series[0].x_interval == ([None], [None])
