"""What a run will need, before anything is loaded: memory per rank, bytes over the wire, seconds per step.

hardware.py       the machines that a run is planned for
configuration.py  where the model's configuration lies
job.py            the settings and the hardware, resolved as training resolves them
model_facts.py    the model's parameters and linears, from its configuration alone (on the meta device)
activations.py    what a forward pass keeps for backward, counted on the meta device
gathering.py      bytes that ZeRO-3 gathers together and holds whole
memory.py         bytes per rank, by what they are for, and whether they fit into the GPU and the node
traffic.py        bytes that an optimizer step receives, inside a node and between nodes
speed.py          floating point operations, packed weights made dense, and an estimate of seconds
advice.py         the nearest settings that fit, where these do not
report.py         all of it as a table and as JSON
check.py          what training says and refuses before it loads a model
command.py        what launch/plan.py does
shapes/           the configurations of well-known models
"""
