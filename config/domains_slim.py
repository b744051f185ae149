"""SlimPajama one domain after another, from the Pile (Ibrahim et al. 2024, appendix A.1).

    torchrun --nproc_per_node=8 train.py config/domains_slim.py

For a node of 8 large GPUs or more, 8e20 FLOPs. No loss to expect is known; the paper finds that
this works worse than the mixture, which is config/rewarm_pile_slim.py --replay=0.

Each domain gets as many steps as it has tokens in the 300B sample (Table 1). The order of the
domains is not established; here it is the alphabet, as in the authors' settings. The schedule is
not established either; here it is one cosine over all domains, without replay.
"""
base = 'config/rewarm_pile_slim.py'
out_dir = 'out/domains_slim'
label = 'one domain after another'

# Where each domain ends, in steps of 2,260,992 tokens.   tokens    share of the mixture, %
_arxiv = 5861                       #                     13.25B     4.428
_book = _arxiv + 5563               #                     12.58B     4.203
_c4 = _book + 35326                 #                     79.87B    26.688
_commoncrawl = _c4 + 68946          #                    155.89B    52.088
_github = _commoncrawl + 6914       #                     15.63B     5.224
_stackexchange = _github + 4462     #                     10.09B     3.371
_wikipedia = _stackexchange + 5291  #                     11.96B     3.997

train_data = {'slimpajama/arxiv': 1}
switches = [{'step': _arxiv, 'train_data': {'slimpajama/book': 1}},
            {'step': _book, 'train_data': {'slimpajama/c4': 1}},
            {'step': _c4, 'train_data': {'slimpajama/commoncrawl': 1}},
            {'step': _commoncrawl, 'train_data': {'slimpajama/github': 1}},
            {'step': _github, 'train_data': {'slimpajama/stackexchange': 1}},
            {'step': _stackexchange, 'train_data': {'slimpajama/wikipedia': 1}}]
replay_data = {}
replay = 0
max_steps = _wikipedia              # 132,363
