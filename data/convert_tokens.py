"""Converts token shards from and to the files of the released code, with one shard in memory at a time.

    python data/convert_tokens.py import-jsonl tokens.jsonl TOKENS --tokenizer maskgit_vqgan --crops ten
    python data/convert_tokens.py import-alitok CACHE TOKENS --tokenizer alitok
    python data/convert_tokens.py export-jsonl TOKENS tokens.jsonl
    python data/convert_tokens.py export-alitok TOKENS CACHE

jsonl: one line {"class_id": int, "tokens": [int, ...]} per sequence. AliTok: CACHE/CLASS/IMAGE.npz with `codes` [crops, N].
With --weights the codebook is stored too; without, training takes it from tokenizer.weights. A killed import continues with
the same command.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rear_scale import cli
from rear_scale.config import CONFIG_DIR, InputError, TokenizerConfig, check_yaml
from rear_scale.shards import token_files as tokens
from rear_scale.shards.crops import CROPS
from rear_scale.shards.record import read_manifest


def main() -> None:
    parser = cli.Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in ("import-jsonl", "import-alitok", "export-jsonl", "export-alitok"):
        command = commands.add_parser(name)
        command.add_argument("source", type=Path, help="what is read")
        command.add_argument("out", type=Path, help="what is written")
        if name.startswith("import"):
            known = ", ".join(sorted(path.stem for path in (CONFIG_DIR / "tokenizer").glob("*.yaml")))
            command.add_argument("--tokenizer", required=True, help=f"the tokenizer that made the tokens: {known}")
            command.add_argument("--weights", metavar="FILE", help="weights of that tokenizer, for the codebook")
        if name == "import-jsonl":
            command.add_argument(
                "--crops", choices=CROPS, default="center", help="crops of an image, which are consecutive"
            )
        if name == "import-alitok":
            command.add_argument(
                "--class-map", type=Path, metavar="FILE", help="class ids by folder name, text or JSON"
            )
    arguments = parser.parse_args()
    if arguments.command == "import-jsonl":
        crops = tokens.Crops(arguments.crops, CROPS[arguments.crops])
        tokens.import_jsonl(arguments.source, arguments.out, tokenizer(arguments), crops)
    elif arguments.command == "import-alitok":
        tokens.import_alitok(arguments.source, arguments.out, tokenizer(arguments), arguments.class_map)
    elif arguments.command == "export-jsonl":
        tokens.export_jsonl(arguments.source, arguments.out)
    else:
        tokens.export_alitok(arguments.source, arguments.out)
    if arguments.command.startswith("export"):
        cli.end(arguments.out)
    else:
        following = cli.typed("train", "--config", "CONFIG.yaml", f"data.train={arguments.out}")
        cli.end(arguments.out, read_manifest(arguments.out).in_a_line(), following)


def tokenizer(arguments: argparse.Namespace) -> TokenizerConfig:
    """The config of --tokenizer: a name in configs/tokenizer/, or a path. Raises InputError for anything else."""
    name = arguments.tokenizer
    path = next((file for file in (CONFIG_DIR / "tokenizer" / f"{name}.yaml", Path(name)) if file.is_file()), None)
    if path is None:
        raise InputError(f"--tokenizer {name}: no such file in {CONFIG_DIR / 'tokenizer'} or here. Use one of --help")
    try:
        check_yaml(path.read_text(), f"--tokenizer {path}")
        cfg = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TokenizerConfig), OmegaConf.load(path)))
    except InputError:
        raise
    except (OmegaConfBaseException, yaml.YAMLError, OSError, ValueError, AttributeError) as error:
        raise InputError(f"--tokenizer {path}: {str(error).splitlines()[0]}. Repair the file") from error
    assert isinstance(cfg, TokenizerConfig), type(cfg)
    cfg.weights = arguments.weights
    return cfg


if __name__ == "__main__":
    cli.run(main)
