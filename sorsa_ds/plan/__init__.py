"""What a run will need, before anything is loaded: memory of a rank, bytes over the wire, seconds a step.

job       the settings and the hardware, settled as training settles them
facts     the model's parameters and linears, from its configuration alone (meta device)
memory    bytes a rank, by what they are for: parameters, optimizer and residual exactly, the rest counted
traffic   bytes that an optimizer step receives, inside a node and between nodes
speed     floating point operations, packed weights made dense, and an estimate of seconds
fit       whether that is in the GPU's memory, and in the node's
advice    the nearest settings that fit, where these do not
report    all of it as a table and as JSON
check     what launch/train.py says and refuses before it loads a model
"""
