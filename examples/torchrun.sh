#!/bin/bash
# Two processes under DDP, recorded by rank 0; farcli stands in front of the launcher and changes nothing else.
# Weights sharded by fully_shard are recorded in the same way.
set -e
rm -rf digits-ddp digits-ddp.zarr
farcli record -o digits-ddp.zarr --every 20 -- \
    torchrun --standalone --nproc-per-node 2 examples/train_digits.py --epochs 3 --out digits-ddp
farcli inspect digits-ddp.zarr --format table
