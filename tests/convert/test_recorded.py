"""Every published kind of model, without its fixture: what it computed when it matched the reference (`recorded_outputs`)."""

import json

import pytest
import torch

from recorded_outputs import FILE, build, outputs, summary

ENTRIES = json.loads(FILE.read_text())


@pytest.mark.parametrize("name", ENTRIES)
def test_outputs_are_those_recorded(name):
    entry = ENTRIES[name]
    made = outputs(build(entry["class_name"], entry["config"]))
    assert {key: list(value.shape) for key, value in made.items()} == {
        key: value["shape"] for key, value in entry["outputs"].items()
    }
    for key, output in made.items():
        expected = torch.tensor(entry["outputs"][key]["numbers"])
        assert expected.std() > 0.05 and expected.isfinite().all()
        torch.testing.assert_close(
            torch.tensor(summary(output)), expected, atol=1e-4 * max(1, expected.abs().max().item()), rtol=0
        )
