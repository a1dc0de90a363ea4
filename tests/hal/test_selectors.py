import itertools
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embodied.core.errors import ConfigError
from hal.pool.selectors import Description, Selector, checked, match, missing, parse, text

ARM = Description(
    "so101:0", "so101", ("robot", "arm"), "bench1", ("camera.wrist",), {"lab": "west"}
)
OTHER = Description("so101:1", "so101", ("robot", "arm"), "bench1", (), {"lab": "east"})
GPU = Description("gpu:0", "gpu", (), "bench2", ("cuda",), {"model": "NVIDIA H200 (MIG 1g)"})
ROWS = [ARM, OTHER, GPU]

FIRST = string.ascii_letters + "_"
REST = string.ascii_letters + string.digits + "_.:/+-"
names = st.builds(str.__add__, st.sampled_from(FIRST + string.digits), st.text(REST, max_size=6))
kinds = st.builds(str.__add__, st.sampled_from(FIRST + "*?"), st.text(REST + "*?", max_size=6))
values = st.text(min_size=1, max_size=8).filter(
    lambda v: v.isprintable() and v == v.strip() and not set("{},=") & set(v)
)
details = {
    "capabilities": st.lists(names, max_size=3, unique=True).map(tuple),
    "host": st.none() | names,
    "labels": st.dictionaries(names, values, max_size=3),
}
selectors = st.builds(Selector, kind=kinds, count=st.integers(1, 9), **details) | st.builds(
    Selector, id=names, **details
)


@given(st.lists(selectors, min_size=1, max_size=4))
def test_the_text_form_reads_back_as_what_was_written(wanted):
    assert parse(text(wanted)) == tuple(wanted)


@given(st.text("2 ai*d=@[]{},.", max_size=14) | st.text(max_size=12))
def test_any_text_is_a_selector_or_a_clear_error(given):
    try:
        found = parse(given)
    except ConfigError as error:
        assert "selector" in str(error)
    else:
        assert parse(text(found)) == found


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("2 arm[camera.wrist], 1 gpu", (Selector("arm", 2, ("camera.wrist",)), Selector("gpu"))),
        ("so101@bench1", (Selector("so101", host="bench1"),)),
        ("arm{lab=west}", (Selector("arm", labels={"lab": "west"}),)),
        ("id=so101:0", (Selector(id="so101:0"),)),
        (" 3 * @ h{ a = b c }[ x ,y ] ", (Selector("*", 3, ("x", "y"), "h", {"a": "b c"}),)),
        ("id = x@h", (Selector(id="x", host="h"),)),
        ("id, idle", (Selector("id"), Selector("idle"))),
    ],
)
def test_examples(given, wanted):
    assert parse(given) == wanted


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ("", "expected a kind.*found the end at character 1"),
        ("2", "expected a kind"),
        ("arm,", "expected a kind.*at character 5"),
        ("arm gpu", "expected ',' or the end.*found 'gpu' at character 5"),
        ("arm[]", r"expected a capability.*found '\]' at character 5"),
        ("arm[a b]", "expected ',' or '\\]' after a capability"),
        ("arm{lab}", "expected '=' after label 'lab'"),
        ("arm{lab=}", "expected a value for label 'lab'"),
        ("arm{a=b, a=c}", "label 'a' stands there twice"),
        ("arm@", "expected a host"),
        ("arm[a][b]", "expected ',' or the end"),
        ("arm[a,a]", "stands there twice.*in 'arm"),
        ("0 arm", "count is 0; it must be 1 to 256"),
        ("200 arm, 100 gpu", "ask for 300 devices; ask for 1 to 256"),
        ("2 id=x", "names one device, yet count is 2"),
    ],
)
def test_what_is_wrong_and_where(given, complaint):
    with pytest.raises(ConfigError, match=complaint):
        parse(given)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "2arm"},
        {"kind": "a b"},
        {"count": 0},
        {"count": True},
        {"count": "2"},
        {"capabilities": "camera"},
        {"capabilities": ("",)},
        {"host": ""},
        {"labels": {"a": " b"}},
        {"labels": {"a": "x,y"}},
        {"labels": {"a": 3}},
        {"id": "a,b"},
        {"id": "x", "kind": "arm"},
    ],
)
def test_a_selector_is_checked(fields):
    with pytest.raises(ConfigError):
        Selector(**fields)
    with pytest.raises(ConfigError, match="0 devices"):
        checked([])


@pytest.mark.parametrize(
    "fields",
    [{"id": "a b"}, {"kind": "a*"}, {"classes": ("3d",)}, {"host": ""}, {"labels": {"": "x"}}],
)
def test_a_description_is_checked(fields):
    with pytest.raises(ConfigError, match="device"):
        Description(**({"id": "a", "kind": "b"} | fields))


@pytest.mark.parametrize(
    ("wanted", "fitting"),
    [
        ("*", [ARM, OTHER, GPU]),
        ("so101", [ARM, OTHER]),
        ("so10?", [ARM, OTHER]),
        ("robot", [ARM, OTHER]),
        ("*[camera.wrist]", [ARM]),
        ("arm{lab=east}", [OTHER]),
        ("gpu{model=NVIDIA H200 (MIG 1g)}@bench2", [GPU]),
        ("arm@bench2", []),
        ("id=gpu:0[cuda]", [GPU]),
        ("id=gpu:0[camera]", []),
    ],
)
def test_fits(wanted, fitting):
    [selector] = parse(wanted)
    assert [row for row in ROWS if selector.fits(row)] == fitting


def test_a_greedy_choice_would_fail_here():
    assert match(parse("arm, arm[camera.wrist]"), ROWS) == (OTHER, ARM)
    assert match(parse("arm, *, id=so101:0"), ROWS) == (OTHER, GPU, ARM)


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        ("kuka", "'kuka' needs 1, 0 fit: 0 of kind 'kuka', there are arm, gpu, robot, so101"),
        ("3 arm", "'3 arm' needs 3, 2 fit"),
        ("2 arm[camera.wrist]", "1 with capability camera.wrist"),
        ("arm{lab=north}", "0 with label lab=north"),
        ("arm@bench2", "0 on host bench2"),
        ("id=x", "no device has the id x, there are gpu:0, so101:0, so101:1"),
        ("gpu, 2 arm, so101", "'2 arm, so101' together need 3, 2 fit: so101:0, so101:1"),
        ("2 arm, gpu", ""),
    ],
)
def test_what_is_missing(wanted, why):
    assert why in missing(parse(wanted), ROWS)
    assert bool(missing(parse(wanted), ROWS)) == bool(why)
    assert "no device is registered" in missing(parse(wanted), [])


devices = st.lists(st.sets(st.sampled_from("abc"), max_size=3), max_size=6).map(
    lambda sets: [
        Description(f"d:{k}", "x", capabilities=tuple(sorted(has))) for k, has in enumerate(sets)
    ]
)
wants = st.lists(
    st.builds(
        Selector,
        count=st.integers(1, 2),
        capabilities=st.sets(st.sampled_from("abc"), max_size=2).map(lambda s: tuple(sorted(s))),
    ),
    min_size=1,
    max_size=3,
)


@given(wants, devices)
def test_matching_finds_the_most_preferred_of_all_solutions(wanted, rows):
    places = [selector for selector in wanted for _ in range(selector.count)]
    solutions = [
        sorted(choice)
        for choice in itertools.permutations(range(len(rows)), len(places))
        if all(place.fits(rows[k]) for place, k in zip(places, choice, strict=True))
    ]
    found = match(wanted, rows)
    assert (found is None) == (not solutions)
    assert (missing(wanted, rows) == "") == bool(solutions)
    if found is not None:
        assert all(place.fits(row) for place, row in zip(places, found, strict=True))
        assert sorted(rows.index(row) for row in found) == min(solutions)
