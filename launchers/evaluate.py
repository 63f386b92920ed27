"""Scores images: FID, sFID, Inception Score, precision, recall, density, coverage; and a checkpoint's token predictions.

    torchrun --nproc-per-node 8 launchers/evaluate.py --checkpoint runs/rear_xl evaluate.reference.adm=REFERENCE.npz
    python launchers/evaluate.py --samples SAMPLES.npz evaluate.reference.adm=REFERENCE.npz evaluate.inception_weights=FILE
    ... --checkpoint runs/rear_xl --sweep sample.guidance.scale=4.0,6.9 --also runs/rear_l     several in one job

A checkpoint's images are generated during scoring and not stored; samples that launchers/sample.py has written before are used
instead. --samples takes an .npz, a folder of images, or tar shards. Writes RUN/result.json (result_SETTING.json with --sweep;
SAMPLES.result.json without a checkpoint). The same command continues after a kill, on any number of ranks, with the same
results. --part I/N computes one of N parts of the features, for parallel jobs on a shared file system; the job that finds all
parts complete computes the scores. --reconstruct scores reconstructions of images by the tokenizer of --config.
--write-statistics writes statistics of the images, to be used as a reference; image files are cropped to
tokenizer.image_size. It needs no evaluate.reference; if one is set, the images are scored too. --json prints a line of JSON for
each set of images instead of the table, and nothing else on stdout.
"""

from rear_scale import cli
from rear_scale.analysis.token_prediction import score_tokens
from rear_scale.evaluate.command import add_options, evaluate
from rear_scale.report.writing import update_report


def main() -> None:
    parser = cli.make_parser(__doc__, from_checkpoint=True)
    add_options(parser)
    evaluate(cli.parse_either(parser, "evaluate.yaml"), score_tokens, update_report)


if __name__ == "__main__":
    cli.run(main)
