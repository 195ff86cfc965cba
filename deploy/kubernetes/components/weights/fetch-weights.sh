#!/bin/sh
# Makes the directory TARGET of the model MODEL, once. Where it is there, nothing is done; it is there only when it is
# whole. A run that was ended goes on where it stopped. MODEL is an id of the hub, or a directory on a volume.
set -eu
project=${PROJECT:-/opt/gptj-triton}

if [ -d "$TARGET" ]; then
    echo "$TARGET is there already"
    exit 0
fi
source=$MODEL
if [ ! -d "$MODEL" ]; then
    export HF_HUB_DISABLE_UPDATE_CHECK=1
    source=$TARGET.download
    "$project/.venv/bin/hf" download "$MODEL" --revision "$REVISION" --local-dir "$source" \
        --include "*.json" --include "*.txt" --include "$WEIGHTS"
fi
# Writes TARGET.partial, and renames it at the end. Two runs at once: the second ends with an error, and is tried again.
"$project/.venv/bin/python" "$project/tools/convert_checkpoint.py" "$source" "$TARGET" \
    --to huggingface --weight-data-type "$DATA_TYPE"
rm -rf "$TARGET.download"
