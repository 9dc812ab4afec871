"""What is copied, and how it comes back. In reading order:

* `scopes`: which parameters a scope selects on a model;
* `shards`: this rank's share of each of them, to write in place: the one room that knows DDP, FSDP and DeepSpeed;
* `optimizers`: what an optimizer remembers, wherever it keeps it, and putting that back;
* `copies`: the live values by key, and a copy of them: take, put back, exchange, lerp;
* `store`: `AnchorStore`, made of it: the order of calls, and optimizer state; `file`: the same on disk;
* `dtensor_file`: under FSDP2; `adapters`: the anchor of a PEFT model as an ordinary adapter directory;
* `ranks`: what processes tell one another, never within a step.
"""
