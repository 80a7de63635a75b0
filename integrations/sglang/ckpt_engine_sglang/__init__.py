"""Updates running SGLang servers: a plugin for SGLang's processes, and the command and client that ask them.

- `plugin`: what SGLang loads by itself; `worker_update`, `models`, `rehearsal` and `completeness` do an
  update in its schedulers, `guard` stands before its HTTP routes.
- `sglang_update`: the command; `client.SglangServer`: the same for programs that hold the weights themselves.

This package's README says what SGLang would do without it.
"""
