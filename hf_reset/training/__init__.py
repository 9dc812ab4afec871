"""The Trainer's side. In reading order:

* `callback`: the method, in any Trainer; `resume`: its anchor in a checkpoint, and which checkpoints are whole;
* `arguments` and `trainer`: the same from the command line, with exact resume from anywhere; `sft`: for TRL;
* `best_weights`: the best evaluated weights of any run, kept in memory.
"""
