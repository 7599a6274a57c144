"""Data made on the spot, for machines without the downloads: phantom OCT scans and a spoken corpus.

Both are seeded, and both say what they are wherever they are used: neither passes for the real thing.
"""

OCT_CLASSES = ("choroidal neovascularization", "diabetic macular edema", "drusen", "normal")  # OCTMNIST's labels 0 to 3
OCTMNIST_CLASS_COUNTS = (33_484, 10_213, 7_754, 46_026)  # of its training split
SPEECH_RATE = 22_050  # Hz, of LJ Speech
