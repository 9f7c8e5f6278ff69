"""The operator conformance suite of the onnx wheel, each model through optimize → artifact → run.

python -m tests.compat --jobs 2 -o build/compat.json
"""
