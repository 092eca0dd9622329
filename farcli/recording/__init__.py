"""Recording a training that somebody else's code runs: the same recorder behind every door.

- `plan` says what to record; it travels to an unmodified script in an environment variable.
- `names` finds the networks that optimisers train and names their tensors as their `state_dict` does.
- `picture` decides what is stored each time and what once, and copies weights into buffers.
- `background` writes those buffers to a store from a thread of its own.
- `recorder` counts steps and takes the snapshots: `farcli.Recorder`.
- `injected` is the recorder inside an unmodified script; it alone hooks into the process.
- `checkpoints` reads what trainings saved themselves.
"""
