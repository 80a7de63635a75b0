"""A model, not a measurement: how long 1 to 64 joiners take, when each is a source from its first bucket on.

    python -m benchmarks.fanout --gb 16 --nic 25 --owners 25

One JSON line for each number of joiners: seconds by the plan of `planning/fanout.py`, and seconds if all read
from the owners. Simulated with the plan's own code.
"""

from __future__ import annotations

import argparse
import json

from ckpt_engine.planning.fanout import FanOutRates, fan_out, plan_fan_out, predict_fan_out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gb", type=float, default=16.0, help="GB of the checkpoint")
    parser.add_argument("--bucket-mib", type=float, default=64.0, help="MiB of a bucket")
    parser.add_argument("--nic", type=float, default=25.0, help="GB/s that a joiner receives and sends")
    parser.add_argument("--owners", type=float, default=25.0, help="GB/s that the owners send, together")
    parser.add_argument("--owner-readers", type=int, default=2, help="joiners that may read from owners")
    arguments = parser.parse_args()
    nbytes, bucket = int(arguments.gb * 1e9), int(arguments.bucket_mib * 2**20)
    buckets = [min(bucket, nbytes - start) for start in range(0, nbytes, bucket)]
    rates = FanOutRates(owners=arguments.owners * 1e9, joiner=arguments.nic * 1e9)
    for joiners in (1, 2, 4, 8, 16, 32, 64):
        best = plan_fan_out(joiners, buckets, rates, most_owner_readers=arguments.owner_readers)
        star = predict_fan_out(fan_out(joiners, owner_readers=joiners, joiner_readers=1), buckets, rates)
        line = {
            "benchmark": "fanout",
            "is": "model",
            "joiners": joiners,
            "seconds": round(best.seconds, 4),
            "first_seconds": round(best.first, 4),
            "owner_readers": min(best.plan.owner_readers, joiners),
            "joiner_readers": best.plan.joiner_readers,
            "owner_bytes_per_byte": round(best.owner_nbytes / nbytes, 2),
            "all_from_owners_seconds": round(star.seconds, 4),
        }
        print(json.dumps(line))


if __name__ == "__main__":
    main()
