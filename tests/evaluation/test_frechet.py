"""Frechet distances with known answers; the usual extractors' call, on small programs in their place."""

import pytest
import torch

from cosmos_hf.evaluation.frechet import (
    EfficientNetFeatures,
    FeatureStatistics,
    FrechetPair,
    TorchScriptFeatures,
    compare_videos,
    frechet_distance,
    load_extractors,
)
from feature_files import write_feature_files


def statistics(features):
    result = FeatureStatistics()
    for part in features.split(7):
        result.update(part)
    return result


def test_statistics_in_batches_are_those_of_the_whole():
    features = torch.randn(50, 4, dtype=torch.float64) + 3
    found = statistics(features)
    torch.testing.assert_close(found.mean, features.mean(0))
    torch.testing.assert_close(found.covariance, features.T.cov())
    assert found.count == 50


def test_known_distances():
    """Moved by d: |d|^2. Scaled by s in one dimension: (s - 1)^2 times the variance. Equal: 0."""
    features = torch.randn(100, 3, dtype=torch.float64)
    a = statistics(features)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    moved = statistics(features + torch.tensor([1.0, 2.0, 2.0]))
    assert frechet_distance(a, moved) == pytest.approx(9)
    line = features[:, :1]
    assert frechet_distance(statistics(line - line.mean()), statistics(3 * (line - line.mean()))) == pytest.approx(
        4 * float(line.var())
    )


def test_it_is_the_formula_with_scipys_root():
    linalg = pytest.importorskip("scipy.linalg")
    a, b = (
        torch.randn(30, 5, dtype=torch.float64),
        torch.randn(40, 5, dtype=torch.float64) @ torch.randn(5, 5).double(),
    )
    one, two = statistics(a), statistics(b)
    root = linalg.sqrtm((one.covariance @ two.covariance).numpy()).real
    wanted = float((one.mean - two.mean).square().sum() + one.covariance.trace() + two.covariance.trace())
    assert frechet_distance(one, two) == pytest.approx(wanted - 2 * root.trace())


def test_fewer_vectors_than_features_still_give_a_number_and_a_warning(caplog):
    class Rows:
        metric = "rows"

        def __call__(self, video):
            return video.transpose(1, 2).flatten(0, 1).flatten(1)

    pair = FrechetPair(Rows())
    video = torch.rand(1, 3, 4, 2, 2)
    pair.update(video, video)
    assert pair.figures() == {"distance": pytest.approx(0, abs=1e-6), "count": 4, "features": 12}
    assert "rows from 4 vectors of 12 numbers is far too high" in caplog.text


def test_refusals():
    found = FeatureStatistics()
    with pytest.raises(ValueError, match=r"finite numbers \[N, D\]"):
        found.update(torch.tensor([[float("nan")]]))
    found.update(torch.ones(1, 3))
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(found, found)
    with pytest.raises(ValueError, match="features of 4 numbers, before they had 3"):
        found.update(torch.ones(1, 4))


def test_efficientnet_features_tell_pictures_apart():
    extractor = EfficientNetFeatures()
    ramp = torch.linspace(-1, 1, 48).expand(1, 3, 2, 48, 48)
    features = extractor(torch.cat([ramp, torch.rand(1, 3, 2, 48, 48) * 2 - 1]))
    assert features.shape == (4, 1280) and extractor.metric == "efd"
    same, other = (features[0] - features[1]).norm(), (features[0] - features[2]).norm()
    assert same < 0.01 * other


@pytest.fixture
def files(tmp_path):
    write_feature_files(tmp_path)
    torch.save({"weight": torch.ones(1)}, tmp_path / "weights.pt")
    return tmp_path


def test_the_usual_files_are_called_as_they_want(files):
    video = torch.zeros(2, 3, 10, 32, 32)
    video[1] = 1
    pictures = TorchScriptFeatures(files / "inception.pt", "inception")
    assert pictures.metric == "fid" and pictures(video).shape == (20, 2048)
    assert pictures(video)[:, 0].unique().tolist() == [128, 255]
    videos = TorchScriptFeatures(files / "i3d.pt", "i3d")
    assert videos.metric == "fvd" and videos(video)[:, 0].tolist() == [127.5, 255]
    with pytest.raises(ValueError, match="at least 10 frames, got 9"):
        videos(video[:, :, :9])


def test_missing_and_wrong_files_are_named(files):
    with pytest.raises(FileNotFoundError, match=r"FVD needs i3d_torchscript.pt, to which .*stylegan-v"):
        TorchScriptFeatures(files / "absent.pt", "i3d")
    with pytest.raises(ValueError, match="weights.pt is not a TorchScript file"):
        TorchScriptFeatures(files / "weights.pt", "inception")
    with pytest.raises(ValueError, match="kind must be one of inception, i3d"):
        TorchScriptFeatures(files / "i3d.pt", "resnet")
    wrong = TorchScriptFeatures(files / "inception.pt", "inception")
    wrong.width = 100
    with pytest.raises(ValueError, match="have 100 numbers, this file gives 2048"):
        wrong(torch.zeros(1, 3, 1, 8, 8))


def test_sets_of_videos_by_metric(files):
    """What is too short or too little is said in place of a figure."""
    extractors = load_extractors(files / "inception.pt", files / "i3d.pt", efficientnet=False)
    assert [extractor.metric for extractor in extractors] == ["fid", "fvd"]
    short, long = ([torch.rand(3, frames, 8, 8) * 2 - 1 for _ in range(2)] for frames in (4, 10))
    made = compare_videos(extractors[1:], long, long[::-1])
    assert made["fvd"] == {"distance": pytest.approx(0, abs=1e-6), "count": 2, "features": 400}
    assert compare_videos(extractors[1:], short, short)["fvd"] == {
        "skipped": "needs 10 frames of each video, there are 4"
    }
    assert compare_videos(extractors[1:], long[:1], long[:1])["fvd"] == {
        "skipped": "needs two videos or more, there is one"
    }
