"""The uncertainty head: what it starts as, that it learns the loss of each noise level, and that it is saved whole."""

import torch

from cosmos_hf.models.uncertainty_cosmos import UncertaintyHead


def test_it_starts_neutral_and_learns_the_log_of_the_loss():
    """error * exp(-u) + u is least where u = ln(error): here error = exp(2 c)."""
    head, noise = UncertaintyHead(64), torch.linspace(-1, 1, 64)
    assert torch.equal(head(noise), torch.zeros(64))
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
    for _ in range(400):
        u = head(noise)
        loss = ((2 * noise).exp() * (-u).exp() + u).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (head(noise) - 2 * noise).abs().max() < 0.2


def test_saved_head_keeps_its_random_features(tmp_path):
    head = UncertaintyHead(8)
    torch.nn.init.normal_(head.linear.weight)
    head.save_pretrained(tmp_path)
    noise = torch.randn(5)
    assert torch.equal(UncertaintyHead.from_pretrained(tmp_path)(noise), head(noise))
