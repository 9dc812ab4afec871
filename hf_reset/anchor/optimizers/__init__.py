"""What an optimizer remembers, wherever it keeps it, and putting that back.

Optimizers keep more than tensors in `state[parameter]`: step counts and distance estimates in `param_groups`
(Prodigy), objects inside the state (the projectors of GaLore and APOLLO), lists of tensors (SOAP), a state of their
own in a group (grokadamw), tensors made of tensors (torchao), slow weights in a wrapper (Lookahead), an optimizer for
each parameter (the layerwise ones). So the whole object is walked, down to tensors and plain values.

In reading order: `objects` (which attributes are memory), `reach` (what belongs to a scope, and the one rule for what
parameters share), `arrangement` (a state that stands as it stood needs no walk), `look` (the walk), `put_back` (the way
back), `rehearsal` (an optimizer whose memory cannot all be reached is found out before training).
"""
