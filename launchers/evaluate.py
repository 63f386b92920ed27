"""Scores images: FID, sFID, Inception Score, precision, recall, density, coverage; and a checkpoint's token predictions.

    torchrun --nproc-per-node 8 launchers/evaluate.py --checkpoint runs/rear_xl evaluate.reference.adm=REFERENCE.npz
    python launchers/evaluate.py --samples SAMPLES.npz evaluate.reference.adm=REFERENCE.npz evaluate.inception_weights=FILE
    ... --checkpoint runs/rear_xl --sweep sample.guidance.scale=4.0,6.9 --also runs/rear_l     several in one job

A checkpoint's images are generated while they are scored and written nowhere; samples that launchers/sample.py has written
are used. --samples takes an .npz, a folder of images, or tar shards. Writes RUN/result.json (result_SETTING.json under
--sweep; SAMPLES.result.json without a checkpoint). The same command continues after a kill, on any number of ranks, to the
same numbers. --part I/N computes one of N shares of the features, for jobs that run side by side on one file system; the
one that finds all shares there goes on to the scores. --reconstruct takes images through the tokenizer of --config and back.
--write-statistics makes a reference file of the images; image files are cropped to tokenizer.image_size. It needs no
evaluate.reference; with one, the images are scored too.
"""

from rear_scale import cli
from rear_scale.analysis.token_prediction import score_tokens
from rear_scale.evaluate.command import add_options, evaluate


def main() -> None:
    parser = cli.make_parser(__doc__, from_checkpoint=True)
    add_options(parser)
    evaluate(cli.parse_either(parser, "evaluate.yaml"), score_tokens)


if __name__ == "__main__":
    cli.run(main)
