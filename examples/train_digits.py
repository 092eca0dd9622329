"""A small real training: a network on scikit-learn's digits, with checkpoints it can go on from.

It knows nothing of farcli: `farcli record -o digits.zarr --every 20 -- python examples/train_digits.py`
"""

import argparse
import os
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn


def main() -> None:
    """Train, and save a checkpoint after each epoch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("digits"))
    args = parser.parse_args()

    distributed = "RANK" in os.environ
    if distributed:
        torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank() if distributed else 0
    ranks = torch.distributed.get_world_size() if distributed else 1

    torch.manual_seed(args.seed)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    checkpoint = args.out / "checkpoint.pt"
    first = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["epoch"]
    net = nn.parallel.DistributedDataParallel(model) if distributed else model

    args.out.mkdir(parents=True, exist_ok=True)
    for epoch in range(first, args.epochs):
        order = torch.randperm(1500, generator=torch.Generator().manual_seed(args.seed + epoch))
        for rows in order.split(60):
            mine = rows[rank::ranks]
            loss = nn.functional.cross_entropy(net(x[mine]), y[mine])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if rank == 0:
            model.eval()
            with torch.no_grad():
                right = (model(x[1500:]).argmax(1) == y[1500:]).float().mean().item()
            model.train()
            print(f"epoch {epoch}: loss {loss.item():.4f}, held-out accuracy {right:.3f}", flush=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
    if distributed:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
