"""How much text does pre-training need? Models of nested parts of a corpus.

Micheli et al. 2020, "On the importance of pre-training data volume for compact language models",
arXiv:2010.03813.

The paper pre-trains small models on 10 MB to 4 GB of French and fine-tunes each on questions: 100
MB are nearly as good as 4 GB, and one more stage on the text of the task helps only below that.
Here the parts are 1/256 to all of `docs`, 46 kB to 9 MB. All models take 500 steps, so a smaller
part is read more often, and 40 steps on `maths` follow.

    python -m projects.data_volume                              # writes data/docs/1of256, ...
    python train.py config/pretrain_docs.py --max_steps=500 --train_data="{'docs/1of64': 1}" \
--out_dir=out/volume_1of64

8 minutes on 2 cores for results/projects/data_volume/run.sh. Expect 3.59 nats per byte on docs
from 1/256, which is learned by heart, 1.83 from 1/64, 1.75 from 1/16 and 1.71 from all; and 2.08,
1.83, 1.84 and 1.82 on maths after its stage. Try dropout or fewer steps where text is scarce.

A document is in a part when the hash of its text is low enough, so a part contains the smaller ones
and no document that `docs` holds out.
"""
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import configurator
import data
from configurator import UserError, require
from corpora import embedded, shards
from corpora.formats import tokenizer_hash
from corpora.tokenizer import load_tokenizer


@dataclass
class Config:
    corpus: str = 'docs'                # of bytes: a corpus that needs no network, or one of yours
    data_dir: str = 'data'
    parts: list[int] = field(default_factory=lambda: [256, 64, 16, 4])     # 1/256, 1/64, ...


def documents(folder):
    """The texts of the training documents of a corpus of bytes."""
    tokenizer = load_tokenizer('bytes')
    for path in data.find_shards(folder.name, 'train', folder.parent):
        shard = data.open_shard(path)
        require(shard.tokenizer == tokenizer_hash('bytes'), f'{path}: the tokens are not '
                'bytes. Choose a corpus that was prepared without --tokenizer.')
        ends = np.flatnonzero(shard.tokens == tokenizer.eot)
        for start, end in zip([0, *(ends[:-1] + 1)], ends):
            yield tokenizer.decode(shard.tokens[start:end])


def in_part(texts, part, val=0.05):
    """Of training documents, whose hashes are above `val`, those in the lowest 1/part."""
    share = val + (1 - val) / part
    return [text for text in texts
            if shards.split_of(shards.hash_of(text.encode()), share) == 'val']


def main(argv):
    if '--help' in argv:
        print(f'{__doc__}\n{configurator.help_text(Config)}')
        return
    cfg, _ = configurator.load(Config, argv)
    require(cfg.parts and min(cfg.parts) > 1, f'parts = {cfg.parts}: expected numbers above 1.')
    folder = Path(cfg.data_dir, cfg.corpus)
    if cfg.corpus in embedded.EMBEDDED:
        folder = embedded.build(cfg.corpus, cfg.data_dir)
    texts = list(documents(folder))
    for part in cfg.parts:
        name, chosen = f'{cfg.corpus}/1of{part}', in_part(texts, part)
        if not Path(cfg.data_dir, name).exists():
            shards.write_corpus(chosen, name, cfg.data_dir)
        print(f'{name}: {len(chosen):,} of {len(texts):,} documents')


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(f'projects.data_volume: {error}')
