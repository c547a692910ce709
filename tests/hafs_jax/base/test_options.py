"""Configs to and from JSON and flags: what is unknown, missing or mistyped is one clear line."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from hafs_jax.base.errors import UserError, arg, one_line_errors
from hafs_jax.base.files import read_json, read_jsonl, write_atomic, write_figures, write_json
from hafs_jax.base.flags import Parser, add_flags, with_flags
from hafs_jax.base.options import Bounds, check, did_you_mean, from_dict, option, replace_fields, to_dict


@dataclass(frozen=True)
class Inner:
    rate_max: float = option(0.5, "peak, per step")
    sizes: tuple[int, ...] = option((3, 5), "rows")


@dataclass(frozen=True)
class Outer:
    required: int
    name: str = option("baseline", "which", choices=("baseline", "strict"))
    cap: int | None = option(7, "most rows")
    on: bool = option(True, "whether")
    inner: Inner = option(Inner(), "nested")

    def __post_init__(self) -> None:
        check(self)


def test_json_round_trip() -> None:
    config = Outer(2, "strict", None, False, Inner(0.25, (1,)))
    assert from_dict(Outer, json.loads(json.dumps(to_dict(config))), "here") == config


def test_an_integer_serves_as_a_float_and_not_the_other_way() -> None:
    assert from_dict(Inner, {"rate_max": 2}, "here").rate_max == 2.0
    with pytest.raises(UserError, match=r"here: required: expected int, found 2.5"):
        from_dict(Outer, {"required": 2.5}, "here")
    with pytest.raises(UserError, match=r"here: required: expected int, found True"):
        from_dict(Outer, {"required": True}, "here")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"required": 1, "nmae": "strict"}, r"here: unknown key 'nmae'; did you mean 'name'\?"),
        ({"required": 1, "inner": {"rate_mx": 1.0}}, r"here: inner: unknown key 'rate_mx'; did you mean 'rate_max'\?"),
        ({"name": "strict"}, r"here: Outer lacks required"),
        ({"required": 1, "inner": {"sizes": [1, "x"]}}, r"here: inner: sizes\[1\]: expected int, found 'x'"),
        ({"required": 1, "name": "stict"}, r"name='stict': expected one of baseline, strict; did you mean 'strict'\?"),
        ([1], r"here: expected an object with Outer's keys, found \[1\]"),
    ],
)
def test_bad_values_are_named(values: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_dict(Outer, values, "here")


@dataclass(frozen=True)
class Bounded:
    rate: float = option(0.5, "share", above=0, below=1)
    decay: float | None = option(0.9, "decay", least=0, below=1)
    free: float = option(0.0, "any number")
    rows: int = option(4, "rows", least=1)
    seed: int = option(0, "seed", least=0, most=2**63 - 1)
    weight: float = option(1.0, "weight", above=0)
    ks: tuple[int, ...] = option((1, 2), "levels", least=1, most=4096)
    kinds: tuple[str, ...] = option(("a",), "kinds", choices=("a", "bee"))

    def __post_init__(self) -> None:
        check(self, "part.")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rate": 0.0}, "part.rate=0.0: expected above 0 and below 1"),
        ({"rate": float("nan")}, "part.rate=nan: expected above 0 and below 1"),
        ({"decay": 1.0}, "part.decay=1.0: expected at least 0 and below 1, or none"),
        ({"free": float("inf")}, "part.free=inf: expected a finite number"),
        ({"free": float("nan")}, "part.free=nan: expected a finite number"),
        ({"rows": 0}, "part.rows=0: expected at least 1"),
        ({"rows": None}, "part.rows=None: expected at least 1"),
        ({"rows": "4"}, "part.rows='4': expected at least 1"),
        ({"seed": 2**63}, "part.seed=9223372036854775808: expected 0 to 2^63 - 1"),
        ({"weight": float("inf")}, "part.weight=inf: expected a finite number"),
        ({"ks": (1, 0)}, "part.ks[1]=0: expected 1 to 4,096"),
        ({"kinds": ("a", "bees")}, "part.kinds[1]='bees': expected one of a, bee; did you mean 'bee'?"),
    ],
)
def test_a_value_out_of_bounds_is_named_with_its_bounds(values: dict, message: str) -> None:
    with pytest.raises(UserError) as raised:
        Bounded(**values)
    assert str(raised.value) == message


def test_values_within_bounds_are_taken() -> None:
    assert Bounded(decay=None).decay is None and Bounded(decay=0.0, seed=2**63 - 1, ks=()).ks == ()


def test_bounds_in_words() -> None:
    assert [str(bounds) for bounds in (Bounds(least=0.05, most=1.0), Bounds(least=2**40), Bounds(most=-1))] == [
        "0.05 to 1",
        "at least 2^40",
        "at most -1",
    ]


def test_help_shows_the_bounds_that_are_not_obvious(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser(prog="tool")
    add_flags(parser, Bounded())
    parser.print_help()
    shown = " ".join(capsys.readouterr().out.split())
    assert "--rate X share (above 0 and below 1) [0.5]" in shown and "--rows X rows [4]" in shown
    assert "--weight X weight [1.0]" in shown and "--seed X seed [0]" in shown
    assert "--ks X ... levels (1 to 4,096) [1 2]" in shown
    assert "--kinds {a,bee} ... kinds [a]" in shown


def _parse(*flags: str) -> Outer:
    parser = Parser(prog="tool")
    add_flags(parser, Outer(1))
    return with_flags(Outer(1), parser.parse_args(flags))


def test_flags_override_only_what_they_name() -> None:
    assert _parse() == Outer(1)
    given = _parse("--required", "4", "--cap", "none", "--no-on", "--inner.rate-max", "0.1", "--inner.sizes", "8", "9")
    assert given == Outer(4, "baseline", None, False, Inner(0.1, (8, 9)))


def test_help_names_every_flag_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _parse("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "--inner.rate-max X peak, per step [0.5]" in shown and "--cap X most rows [7]" in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--inner.rate-mx", "1"), "unknown argument '--inner.rate-mx'; did you mean '--inner.rate-max'?"),
        (("--name", "strikt"), "invalid choice: 'strikt'"),
        (("--required", "x"), "argument --required: invalid int value: 'x'"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_2(
    flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        _parse(*flags)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    assert said.startswith("error: ") and message in said


def test_user_errors_are_one_line_and_exit_2_and_others_pass(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        raise UserError("expected a, found b")
    assert stopped.value.code == 2 and capsys.readouterr().err == "error: expected a, found b\n"
    with pytest.raises(ZeroDivisionError), one_line_errors():
        _ = 1 / 0


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"n": 1})

    def fail(file) -> None:
        file.write(b"half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        write_atomic(path, fail)
    assert read_json(path, "a file") == {"n": 1} and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, float("nan"))


def test_json_files_that_are_not_there_or_not_json_are_named(tmp_path) -> None:
    with pytest.raises(UserError, match=r"expected a config at .*no.json, found no such file"):
        read_json(tmp_path / "no.json", "a config")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match=r"expected a config at .*bad.json, found a file that is not JSON"):
        read_json(tmp_path / "bad.json", "a config")


def test_jsonl_leaves_out_a_last_line_cut_by_a_kill(tmp_path) -> None:
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_jsonl(tmp_path / "m.jsonl") == [{"step": 1}, {"step": 2}]
    assert read_jsonl(tmp_path / "none.jsonl") == []


def test_whole_numbers_that_arrays_cannot_count_to_are_refused() -> None:
    with pytest.raises(UserError, match=r"rows=2147483648: expected at most 2\^31 - 1"):
        Bounded(rows=2**31)


def test_a_suggestion_is_never_the_word_itself() -> None:
    assert did_you_mean("topk", ["topk", "topk2"]) == "" and did_you_mean("topkk", ["topk"]) == "; did you mean 'topk'?"


def test_figures_that_are_not_finite_become_null_and_are_named(tmp_path: Path) -> None:
    write_figures(tmp_path / "a", {"a": {"b": [1.0, float("-inf")]}, "c": float("nan"), "d": 2})
    found = read_json(tmp_path / "a", "figures")
    assert found == {"a": {"b": [1.0, None]}, "c": None, "d": 2, "not_finite": {"a.b.1": "-inf", "c": "nan"}}
    write_figures(tmp_path / "a", {"a": 1.0})
    assert read_json(tmp_path / "a", "figures") == {"a": 1.0}


def test_fields_are_replaced_by_name() -> None:
    config, aliases = Outer(1), {"rate": "inner.rate_max"}
    expected = Outer(2, inner=Inner(0.25))
    for names in (
        {"required": 2, "inner.rate_max": 0.25},
        {"required": np.int64(2), "inner": {"rate_max": 0.25}},
        {"required": 2, "rate": 0.25},
        {"required": 2, "inner.rate-max": np.float64(0.25)},
        {"required": 2, "inner": Inner(0.25)},
    ):
        assert replace_fields(config, names, aliases) == expected
    assert replace_fields(config, {"inner.sizes": [1, 2]}).inner == Inner(sizes=(1, 2))
    assert replace_fields(config, {"inner": Inner(0.25), "inner.sizes": (1,)}).inner == Inner(0.25, (1,))
    assert replace_fields(config, {"inner.rate_max": 1}).inner.rate_max == 1.0


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"inner.rate_mx": 1}, r"unknown field 'inner\.rate_mx'; did you mean 'inner\.rate_max'\?"),
        ({"inner": {"rate_mx": 1}}, r"unknown field 'inner\.rate_mx'; did you mean 'inner\.rate_max'\?"),
        ({"sizes": (1,)}, r"unknown field 'sizes'; did you mean 'inner\.sizes'\?"),
        ({"nme": "strict"}, r"unknown field 'nme'; did you mean 'name'\?"),
        ({"inner": 3}, "inner: expected a mapping of its fields, found 3"),
        ({"cap": "7"}, "cap: expected int, found '7'"),
        ({"name": "stict"}, "name='stict': expected one of baseline, strict"),
    ],
)
def test_a_wrong_field_is_named_with_the_nearest(names: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace_fields(Outer(1), names)


def test_an_error_names_options_as_they_are_written(capsys: pytest.CaptureFixture[str]) -> None:
    error = UserError(f"{arg('cap', 0)}: give {arg('name', 'b')}, {arg('on', False)}, {arg('force', True)}, {arg('x')}")
    assert str(error) == "cap=0: give name='b', on=False, force=True, x"
    with pytest.raises(SystemExit), one_line_errors():
        add_flags(parser := Parser(prog="tool"), Outer(1), aliases={"c": "cap"})
        parser.add_argument("--force", action="store_true")
        parser.parse_args(["--c", "3"])
        raise error
    assert capsys.readouterr().err == "error: --c 0: give --name b, --no-on, --force, x\n"
    with pytest.raises(SystemExit), one_line_errors():
        raise error
    assert "force=True" in capsys.readouterr().err  # outside of a command with flags
