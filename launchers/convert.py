"""Consolidates a checkpoint into one safetensors file of weights under their official names.

python launchers/convert.py --checkpoint runs/rear_xl --out rear_xl.safetensors
python launchers/convert.py --checkpoint runs/rear_xl --out rear_xl_ema.safetensors --ema
"""

from pathlib import Path

from safetensors.torch import save_file

from rear_scale import cli
from rear_scale.config import InputError


def main() -> None:
    parser = cli.make_parser(__doc__, from_checkpoint=True)
    parser.add_argument("--out", type=Path, metavar="FILE.safetensors", help="the file to write")
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights instead")
    command = cli.parse_checkpoint(parser)
    checkpoint, out = command.checkpoint, command.args.out
    if command.args.dry_run:
        print(f"{checkpoint.path}: {len(checkpoint.names())} weights of step {checkpoint.step} -> {out}")
        return
    if out is None:
        raise InputError("--out is missing. Use --out FILE.safetensors")
    kind = "ema" if command.args.ema else "param"
    if not checkpoint.has(kind):
        raise InputError(
            f"--ema: {checkpoint.path} has no moving average. Leave --ema out, or train with optim.ema_decay=0.9999"
        )
    read = checkpoint.reader(kind)
    part = out.with_name(f"{out.name}.part")
    save_file({name: read(name) for name in checkpoint.names()}, part, metadata={"format": "pt"})
    part.replace(out)


if __name__ == "__main__":
    cli.run(main)
