"""What is copied, and how it comes back. In reading order:

* `scopes`: which parameters a scope selects on a model;
* `shards`: this rank's share of each of them, to write in place: the one room that knows DDP, FSDP and DeepSpeed;
* `store`: `AnchorStore`, a copy of these views, and putting it back;
* `dtensor_file`: the anchor on disk under FSDP2; `adapters`: that of a PEFT model as an ordinary adapter directory;
* `ranks`: what processes tell one another, never within a step.
"""
