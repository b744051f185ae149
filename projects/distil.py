"""Self-distillation as a regulariser of further pre-training.

Lee et al. 2022, arXiv:2210.02871.

A model that is pre-trained further on new data moves far from where it was. So it is done twice:
the model of the first time becomes the teacher, and the old weights start once more as its student.
The student learns from the data and is drawn to the teacher's hidden vectors h' with
distil * |h - h'|^2, which the paper finds to keep it closer to its start than the first time.

    python train.py config/rewarm_docs_code.py --replay=0 --out_dir=out/teacher
    python -m projects.distil config/rewarm_docs_code.py --replay=0 --teacher=out/teacher \
--out_dir=out/student

4 minutes on 2 cores for the second command. Without a teacher it is the model at the start of the
stage, as in "learning without forgetting" (Li & Hoiem 2016, arXiv:1606.09282). The paper takes one
vector an image, we take all tokens of a text.

Expect (results/projects/distil, one seed) that the student does not forget less: 2.119 on docs, the
teacher 2.095. It is a little better on code, 1.151 against 1.157, and with --distil=0.01 it reaches
1.131 (docs 2.104). It has read no more text, but its teacher has cost as much again. Try next: a
third round, the old model as the teacher, or a teacher with replay.
"""
import copy
from dataclasses import asdict, dataclass

import torch

import data
import eval
import train
from configurator import require
from model import cross_entropy
from support.huggingface import load_weights


@dataclass
class Knobs(train.Config):
    # --- self-distillation -------------------------------------------------------------------
    teacher: str = ''                   # a run or checkpoint; '': the model at the start
    distil: float = 1.0                 # weight of the squared distance to its hidden vectors


class Distil(train.Method):
    Config, Parent = Knobs, train.Method

    def start(self, model, saved):
        """The teacher is in the checkpoint: a resumed run does not need its file."""
        self.hidden = {}                                # {'student' or 'teacher': (B, T, C)}
        self.teacher = copy.deepcopy(model).requires_grad_(False)
        if saved:
            load_weights(self.teacher, saved['teacher'], self.cfg.out_dir)
        elif self.cfg.teacher:
            state, found = eval.load_run(self.cfg.teacher)
            self.check(state, found.config, model.config)
            load_weights(self.teacher, found.state_dict(), self.cfg.teacher)
        self.keep_hidden(model, 'student')
        self.keep_hidden(self.teacher, 'teacher')

    def check(self, state, theirs, ours):
        """UserError unless the teacher reads the same tokens and has hidden vectors of our size."""
        name = next(iter(self.cfg.train_data))
        source = data.open_source(self.cfg, name, 'train')
        data.one_tokenizer({name: source}, state.get('history', {}).get('tokenizer'))
        require(theirs.vocab_size == ours.vocab_size, f'teacher {self.cfg.teacher} has another '
                f'vocabulary, of {theirs.vocab_size} rows and {ours.vocab_size} here. Take a '
                'teacher that was trained with our tokenizer.')
        theirs, ours = asdict(theirs), asdict(ours)
        differ = [knob for knob in ours if knob != 'max_position_embeddings'
                  and theirs[knob] != ours[knob]]
        require(not differ, f'teacher {self.cfg.teacher} has another shape: {", ".join(differ)}. '
                'Take one that began with the same old model.')

    def keep_hidden(self, model, who):
        """Keep what the last LayerNorm of a model returns, each time that it is called."""
        def keep(module, inputs, output):
            self.hidden[who] = output
        model.gpt_neox.final_layer_norm.register_forward_hook(keep)

    def objective(self, model, x, y, sources):
        logits, _ = model(x)
        with torch.no_grad():
            self.teacher(x)
        distance = self.hidden['student'].float() - self.hidden['teacher'].float()   # (B, T, C)
        squared = distance.square().sum(-1).mean()
        loss = cross_entropy(logits, y)
        return loss + self.cfg.distil * squared, {'cross_entropy': loss, 'distance': squared}

    def state_dict(self):
        return {'teacher': self.teacher.state_dict()}


if __name__ == '__main__':
    train.launch(Distil)
