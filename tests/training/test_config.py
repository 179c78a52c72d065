"""Settings: files, flags, and what is refused."""

from dataclasses import dataclass, field

import pytest

from cosmos_hf.training.config import RunConfig, parse, read_yaml


@dataclass
class Config(RunConfig):
    widths: list[int] = field(default_factory=lambda: [1])
    share: float = 0.5


@pytest.fixture
def file(tmp_path):
    def write(text):
        (tmp_path / "run.yaml").write_text(text)
        return str(tmp_path / "run.yaml")

    return write


def test_flags_over_file_over_defaults(file):
    path = file("output_dir: a\ndata: [x, y]\nlearning_rate: 1e-3\nwidths: [4, 8]\nprogress: false\nmax_steps: 7\n")
    config = parse(Config, ["--config", path, "--max_steps", "9"])
    assert (config.output_dir, config.data, config.widths, config.progress) == ("a", ["x", "y"], [4, 8], False)
    assert (config.learning_rate, config.max_steps, config.share) == (1e-3, 9, 0.5)
    assert parse(Config, ["--config", path, "--progress", "true", "--data", "z"]).data == ["z"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "unknown key 'learning_rat', did you mean 'learning_rate'"),
        ("max_steps: soon", "max_steps must be of type int, got 'soon'"),
        ("max_steps: 2.5", "max_steps must be of type int"),
        ("progress: 1", "progress must be of type bool"),
        ("learning_rate: fast", "learning_rate must be of type float"),
        ("data: folder", "data must be of type list"),
    ],
)
def test_a_file_with_a_mistake_is_refused(file, text, message):
    with pytest.raises(ValueError, match=message):
        read_yaml(Config, file(text))


def test_an_unknown_flag_is_refused(file, capsys):
    with pytest.raises(SystemExit):
        parse(Config, ["--output_dir", "a", "--data", "b", "--learning_rat", "1"])
    assert "--learning_rat" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(batch_size=0), "batch_size must be at least 1"),
        (dict(learning_rate=0.0), "the run would learn nothing"),
        (dict(lr_schedule="linear"), "lr_schedule must be one of constant, cosine"),
        (dict(lr_schedule="cosine", cooldown_steps=5), "belongs to lr_schedule: constant"),
        (dict(mixed_precision="fp8"), "mixed_precision must be one of"),
        (dict(on_broken="ignore"), "on_broken must be one of"),
        (dict(keep_decoded=True, num_workers=1), "keep_decoded needs num_workers=0"),
    ],
)
def test_contradictions_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(output_dir="a", data=["b"], **settings)


def test_output_and_data_must_be_given():
    with pytest.raises(ValueError, match="output_dir and data must be given"):
        parse(Config, ["--output_dir", "a"])
