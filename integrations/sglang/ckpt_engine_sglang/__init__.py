"""The place of SGLang's update command and the hook into its processes. Not in this version: this package holds no code yet.

An engine's worker can receive updates without it, by calling `ckpt_engine.ipc.receiver.serve_update`
from a method that the engine can be asked to run. `ckpt_engine.embedded_engine.engine` does just that.
"""
