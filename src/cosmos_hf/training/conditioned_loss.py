"""The loss of a post-training with further conditions, and how it is seen whether they are followed.

`sensitivity_<condition>` is how much the output changes when the samples of a batch exchange a condition, as a share of the
output; of views, how much the others change with the first.
"""

import torch
from torch import nn

from ..conditioning.camera import move_rays
from ..conditioning.frames import condition_indicator
from ..conditioning.views import draw_given_frames, pick_views, reference_view
from ..schedulers.scheduling_edm_cosmos import with_uncertainty
from .adaptation import sensitivities
from .cache import LatentDataset
from .diffusion import DiffusionLoss, WorldModel, validate

INPUTS = {"camera": "camera", "action": "actions", "trajectory": "actions", "instruction": "text", "views": "latents"}
CHANGE = 0.1  # share of the latents' variance that makes half a motion
MARGIN = 0.1  # by which share another text should make the error larger; more is not asked for
ZEROED = ("actions", "camera")  # by `condition_dropout`, where a batch has them


class ConditionedLoss(DiffusionLoss):
    """`compute_loss` of `fit`: conditions are zeroed for a share of samples, and once per log line their effect is measured."""

    calls = 0

    def num_views(self, batch: dict) -> int:
        return len(batch.get("view_indices", self.config.views)) or 1

    def draw_counts(self, batch: dict) -> torch.Tensor:
        views, latents, config = self.num_views(batch), batch["latents"], self.config
        if views == 1:
            return super().draw_counts(batch)
        least, most = config.min_condition_frames, config.max_condition_frames
        frames, device = latents.shape[2] // views, latents.device
        return draw_given_frames(len(latents), views, frames, most, config.whole_views, device, least)

    def weights(self, latents: torch.Tensor, views: int) -> torch.Tensor | None:
        """[B, 1, T', H', W'], of mean 1: `motion_weight` times more where the latents are far from their view's first frame."""
        if not self.config.motion_weight:
            return None
        split = latents.unflatten(2, (views, -1))  # [B, C, V, T, H', W']
        change = (split - split[:, :, :, :1]).square().mean(1, keepdim=True).flatten(2, 3)
        weights = 1 + self.config.motion_weight * change / (change + CHANGE * self.scheduler.config.sigma_data**2)
        return weights / weights.mean(dim=(1, 2, 3, 4), keepdim=True)

    def draw_views(self, batch: dict) -> dict:
        """The batch with `views_per_step` of its views, in their order; rays as a call of those views has them."""
        views, count = len(self.config.views), self.config.views_per_step
        if not count:
            return batch
        indices = tuple(sorted(torch.randperm(views)[:count].tolist()))
        axes = {"latents": 2, "text": 1, "camera": 2}
        if batch.get("actions") is not None and batch["actions"].shape[1] > 1:
            axes["actions"] = 1
        picked = {name: pick_views(batch[name], indices, views, dim) for name, dim in axes.items() if name in batch}
        if "camera" in picked:
            first = batch["first_cameras"][:, indices[reference_view(indices)]]
            picked["camera"] = move_rays(picked["camera"], first)
        return batch | picked | {"view_indices": indices}

    def __call__(self, model: nn.Module, batch: dict) -> tuple[torch.Tensor, dict]:
        batch = self.draw_views(batch)
        size, device, logs = len(batch["latents"]), batch["latents"].device, {}
        if self.calls % (self.config.log_every * self.config.gradient_accumulation) == 0:
            seen = {
                name: value for name, value in batch.items() if name != "other_text"
            }  # the step itself measures that
            logs = {name: value for name, value in self.sensitivity(model, seen).items() if name.startswith("sens")}
        self.calls += 1
        keep = (torch.rand(size, device=device) >= self.config.condition_dropout).float()
        seen = {name: batch[name] * keep.view(-1, *[1] * (batch[name].ndim - 1)) for name in ZEROED if name in batch}
        loss, more = super().__call__(model, batch | seen)
        return loss, more | logs

    def objective(self, model: nn.Module, batch: dict, counts, keep: torch.Tensor) -> tuple[torch.Tensor, dict]:
        """With `contrast` also how far the error with another text, in the same noise, is from being `MARGIN` larger.

        Most of an error has nothing to do with the text, and its gradient drowns what the text decides. In the difference of two
        errors that only the text tells apart it cancels out.
        """
        if not self.config.contrast:
            return super().objective(model, batch, counts, keep)
        device = batch["latents"].device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            other, _, _ = self.losses(model, batch | {"text": batch["other_text"]}, counts, keep)
        own, log_variance, sigma = self.losses(model, batch, counts, keep)
        short = (own - other + MARGIN * own.detach()).clamp(min=0) * keep  # of dropped texts nothing is to be learned
        loss = with_uncertainty(own, log_variance) + self.config.contrast * short
        ratio = (other * keep).sum() / (own * keep).sum().clamp(min=1e-6)
        logs = {"denoising": own.detach().mean(), "contrast_ratio": ratio.detach()}
        return loss.mean(), logs | self._by_band(own.detach(), sigma)

    @torch.no_grad()
    def sensitivity(self, model: nn.Module, batch: dict) -> dict[str, float]:
        """For every condition of the run what changes when each sample gets the next one's, the first frame being given.

        Of views it is what changes in the others when the first one is given whole, and is another sample's.
        `sensitivity_<name>`: rms of the output's change over rms of the output, of the frames that are not given.
        `error_ratio_<name>`: denoising error with the wrong condition over that with the right one; above 1 where it is of use.
        `contrast_ratio`: the same for another text of the same scene, where the batch has `other_text`.
        NaN for a single sample. Leaves the random generators as they are.
        """
        figures, size, counts = {}, len(batch["latents"]), self.equal_counts(batch, 1)
        first_given = None  # the same for all conditions but views
        for name in self.config.conditions:
            exchanged = batch[INPUTS[name]].roll(1, 0)
            if name == "views":
                if counts is None:
                    continue  # no frames can be given to the network
                frames = batch["latents"].shape[2] // self.num_views(batch)
                given = counts * 0
                given[:, 0] = frames
                exchanged = torch.cat([exchanged[:, :, :frames], batch["latents"][:, :, frames:]], dim=2)
                right, output = self._evaluate(model, batch, given)
            else:
                given = counts
                first_given = first_given or self._evaluate(model, batch, given)
                right, output = first_given
            wrong, other = self._evaluate(model, batch | {INPUTS[name]: exchanged}, given)
            change = (other - output).square().mean().sqrt() / output.square().mean().sqrt()
            figures[f"sensitivity_{name}"] = float(change) if size > 1 else float("nan")
            figures[f"error_ratio_{name}"] = float(wrong / right) if size > 1 else float("nan")
        if "other_text" in batch:
            right, _ = first_given
            wrong, _ = self._evaluate(model, batch | {"text": batch["other_text"]}, counts)
            figures["contrast_ratio"] = float(wrong / right)
        return figures

    def _evaluate(
        self, model: nn.Module, batch: dict, counts: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean error, output of the frames that are not given), with the same noise every time."""
        latents, outputs = batch["latents"], []
        indicator = condition_indicator(latents.shape[2], 0 if counts is None else counts[:1], latents.device)

        def recorded(*args, **kwargs):
            output, log_variance = model(*args, **kwargs)
            outputs.append(output[:, :, indicator.flatten() == 0].float())
            return output, log_variance

        with torch.random.fork_rng(devices=[latents.device] if latents.device.type == "cuda" else []):
            torch.manual_seed(0)
            error = self.losses(recorded, batch, counts, torch.ones(len(latents), device=latents.device))[0].mean()
        return error, outputs[0]


def validate_conditions(
    model: WorldModel,
    loss: ConditionedLoss,
    batches,
    datasets: dict[str, LatentDataset],
    batch_size: int,
) -> dict:
    """`diffusion.validate`, and the sensitivity to every condition on every validation set."""
    measure = (model, loss, batches, datasets, batch_size)
    return validate(*measure) | sensitivities(*measure)
