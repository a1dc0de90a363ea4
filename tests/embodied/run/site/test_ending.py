"""The end of a run at two sites: neither waits for what the other can no longer say."""

from sites import Learner, Robots, closing, until

from embodied.run.site import hostlink


def test_a_gateway_waits_until_its_hosts_know_that_all_is_delivered(tmp_path):
    learner = Learner(tmp_path)
    host = Robots(tmp_path, "arm", learner)
    with closing(learner, host):
        learner.publish(1.0, final=True)
        until(lambda: host.pump().over, learner)
        until(lambda: learner.look().over and learner.gateway.drained is False, host)
        until(lambda: host.link.done, host, learner)
        assert not learner.gateway.drained
        host.link.close()
        until(lambda: learner.gateway.drained)
        learner.look()
        host.start()
        until(lambda: host.pump().hosts[0].connected, learner)
        assert learner.gateway.drained, "a host that comes again owes nothing"


def test_a_host_leaves_when_all_is_delivered_and_the_gateway_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(hostlink, "_NOBODY_S", 0.3)
    learner = Learner(tmp_path)
    host = Robots(tmp_path, "arm", learner)
    with closing(learner, host):
        learner.publish(1.0, final=True)
        until(lambda: host.pump().over, learner)
        learner.gateway.close()
        assert not host.link.done
        until(lambda: host.link.done, host)
