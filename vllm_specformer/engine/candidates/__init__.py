"""Several drafts per position, verified in one forward of the target, on the V2 runner.

The head drafts a tree of candidates per request. A step lays the trees over its rows (`trees`). The
target's attention lets a row see its ancestors alone (`attention`). The sampler walks down each
tree along what the target itself samples (`sampler`). The draft step keeps the accepted path: the
target's K and V move to consecutive slots (`kv_layers`), the head's are stored there, and the next
tree is drafted from the path's end (`speculator`). All of it stays on the device.
"""
