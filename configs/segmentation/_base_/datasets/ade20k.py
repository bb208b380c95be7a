# mmseg's ADE20K, crops of 512x512 from images of (2048, 512) scaled by 0.5 to 2, two images a GPU;
# whole images of (2048, 512) in tests. Why `_base_` is made so: ../models/upernet.py.
_base_ = __import__("mmseg").__path__[0] + "/.mim/configs/_base_/datasets/ade20k.py"
train_dataloader = dict(batch_size=2)
