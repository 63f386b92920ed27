"""Converts weights between formats.

    python launchers/convert.py runs/rear_xl --to consolidated --out rear_xl.safetensors

SOURCE: a run folder (its newest checkpoint), a checkpoint folder, a weight file of ours, or a released one.

    portable      a checkpoint folder: OUT holds *.safetensors and meta.json
    consolidated  one safetensors file of float32 weights, with the config in its header
    official      a file that the released loaders read (.safetensors, .bin or .pth)
    merged        as official, with RAR's two position tables added into one

--ema SIGMA_REL converts an average of this length instead of the weights, made from the snapshots of optim.posthoc_ema up to the
checkpoint's step; --ema alone the moving average of optim.ema_decay.
"""

from pathlib import Path

from rear_scale import cli
from rear_scale.checkpoint.convert import FORMS, convert


def main() -> None:
    parser = cli.make_parser(__doc__, config="for a weight file: the config to use instead of the one that fits it")
    parser.add_argument("source", type=Path, metavar="SOURCE", help="run folder, checkpoint folder or weight file")
    parser.add_argument("--to", required=True, choices=FORMS, help="format to write")
    parser.add_argument("--out", required=True, type=Path, metavar="PATH", help="file, or folder for portable")
    cli.add_ema_option(parser)
    args = cli.parse_source(parser)
    convert(
        args.source, args.config, args.overrides, args.to, args.out, ema=args.ema, dry_run=args.dry_run, full=args.full
    )
    if not args.dry_run:
        # The merged form is for the released loaders alone.
        cli.end(args.out, args.to, "" if args.to == "merged" else cli.typed("sample", "--checkpoint", args.out))


if __name__ == "__main__":
    cli.run(main)
