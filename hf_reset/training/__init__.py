"""The Trainer's side. In reading order:

* `metric`: which evaluation result chooses weights, and the same on every rank;
* `scheduled`: which evaluations are the Trainer's own; `parameters`: those that change amid training;
* `callback`: the method, in any Trainer; `run`: what it keeps of one call of `train()`; `narration`: what it says;
* `resume`: its anchor in a checkpoint; `checkpoints`: which of these are whole;
* `arguments` and `trainer`: the same from the command line, with exact resume from anywhere; `sft`: for TRL;
* `advisor`: says in the log what goes wrong with the resets;
* `rows`: row numbers through the Trainer's data loaders, and out of each batch before the model; `memory`:
  what is remembered of them, and the suspects among them; `refining` and `responses`: losses of rows, weights, and
  corrected targets;
* `racing`: evaluations as races against the anchor, which end once clearly lost; `raceable`: where they can be;
* `ema`: a moving average of the weights, swapped in where the Trainer evaluates and saves;
* `best_weights`: the best evaluated weights of any run, kept in memory.
"""
