"""Plans a run on a cluster: memory, time and GPU-hours of every strategy, and a recommendation.

    python launchers/plan.py --config rear_xl.yaml cluster.gpus=64 cluster.gpu=h100-80g
    python launchers/plan.py --config rear_7b.yaml cluster.gpus=512 --simulate

Needs no GPU and allocates no weights. Known GPUs are listed in configs/devices/gpus.yaml. Overrides of strategy,
train.activation_checkpointing and train.micro_batch_size are kept; without them, the fastest choice that fits is recommended.
"""

import json

from rear_scale import cli, config
from rear_scale.scaling import output
from rear_scale.scaling.cluster import open_cluster
from rear_scale.scaling.command import make_plan
from rear_scale.shards.codebook import classes_of_shards, is_packed


def main() -> None:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument(
        "--measure", action="store_true", help="time a few steps on this machine and plan with that rate"
    )
    parser.add_argument(
        "--simulate",
        action="store_true",
        help="also simulate an update on one rank with fake tensors; takes seconds per block",
    )
    command = cli.parse(parser)
    if command.args.dry_run:
        cluster = open_cluster(command.cfg)
        print(f"{command.args.config} on {cluster.gpus} x {cluster.gpu}: nothing is planned in a dry run")
        if command.args.full:
            print(config.to_yaml(command.cfg))
        return
    args = command.args
    cfg = command.cfg
    if is_packed(cfg.data.train):
        cfg, _ = classes_of_shards(cfg, command.given)
    found = make_plan(args.config, cfg, args.overrides, measured=args.measure, simulated=args.simulate)
    print(json.dumps(output.as_dict(found), indent=1) if args.json else output.as_text(found))


if __name__ == "__main__":
    cli.run(main)
