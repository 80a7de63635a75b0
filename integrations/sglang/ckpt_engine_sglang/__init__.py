"""The place of SGLang's update command and the hook into its processes.

Not in this version: there is no code here yet. Until there is, an engine's worker can receive updates
by calling `ckpt_engine.ipc.receiver.serve_update` from a method that the engine can be asked to run;
`ckpt_engine.embedded_engine.engine` does just that.
"""
