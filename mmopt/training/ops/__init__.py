"""Rules of operators, one file per family. These files import torch, and are imported when a graph is converted."""
