import pytest

from embodied.core.config import compose, convert
from embodied.core.errors import ConfigError
from embodied.run.site.config import SiteConfig
from embodied.weights.staleness import StalenessBound


def test_staleness_bounds():
    assert StalenessBound().check(float("inf"), 99, linked=True) == ""
    bound = StalenessBound(max_staleness_s=60, max_versions_behind=2)
    assert bound.check(60.0, 2, linked=True) == ""
    assert bound.check(61.0, 0, linked=True) == (
        "the learner last confirmed these weights 61 s ago; max_staleness_s is 60"
    )
    assert "3 versions behind" in bound.check(0.0, 3, linked=True)
    assert "has not confirmed" in bound.check(float("inf"), 0, linked=False)


def test_without_a_link_a_host_holds_or_acts_on_as_configured():
    for without_link, holds in (("hold", True), ("act", False)):
        bound = StalenessBound(max_staleness_s=1, without_link=without_link)
        assert bool(bound.check(2.0, 0, linked=False)) == holds
        assert bound.check(2.0, 0, linked=True)


def test_the_default_has_no_bound_and_a_bound_of_what_is_not_used_is_refused():
    def config(*overrides):
        return convert(compose("site", ["gateway=127.0.0.1:1", *overrides]), SiteConfig)

    assert config().staleness == StalenessBound() and not config().staleness.bounds
    assert config("staleness.max_versions_behind=0").staleness.bounds
    with pytest.raises(ConfigError, match="remote=always uses none"):
        config("staleness.max_staleness_s=5", "remote=always")
