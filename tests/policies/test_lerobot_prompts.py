"""What LeRobot's policies are told in words. Importing LeRobot takes long, hence slow."""

import json

import pytest
import torch

from policies.lerobot.export import read_export
from policies.lerobot.policy import state_prompt
from tests.policies.test_lerobot_policy import Case

pytestmark = pytest.mark.slow


def test_the_prompt_that_tells_the_state_is_lerobots():
    from lerobot.policies.pi05.processor_pi05 import Pi05PrepareStateTokenizerProcessorStep
    from lerobot.processor.core import TransitionKey

    states = torch.tensor([[-1.0, -0.3, 0.5], [0.999, 1.0, 1.7]])
    texts = ["open_the drawer ", "close\nit"]
    transition = {
        TransitionKey.OBSERVATION: {"observation.state": states},
        TransitionKey.COMPLEMENTARY_DATA: {"task": texts},
    }
    done = Pi05PrepareStateTokenizerProcessorStep(max_state_dim=5)(transition)
    wanted = done[TransitionKey.COMPLEMENTARY_DATA]["task"]
    found = [state_prompt(t, x.numpy(), 5) for t, x in zip(texts, states, strict=True)]
    assert found == wanted


def test_the_state_prompt_is_read_from_an_export(tmp_path, monkeypatch):
    monkeypatch.setattr("policies.lerobot.export.PATCHED", ())
    case = Case(tmp_path / "vla", "smolvla")
    file = case.path / "policy_preprocessor.json"
    processor = json.loads(file.read_text())
    step = {"registry_name": "pi05_prepare_state_tokenizer_processor_step"}
    processor["steps"].insert(-1, step | {"config": {"max_state_dim": 7}})
    file.write_text(json.dumps(processor))
    assert read_export(case.path).tokenizing.state_size == 7
