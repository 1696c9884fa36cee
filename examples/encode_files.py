"""Embed media files, save the vectors, and rank the files for a sentence or a sound.

    python examples/encode_files.py clips/*.mp4 --model runs/demo --text "a red star going left"
    python examples/encode_files.py clips/*.mp4 --model runs/demo --sound clips/clip_00001.mp4

Text is compared with video in the common space S_vt, sound with video in S_va.
"""

import argparse

import numpy as np

import vatt_fast as vf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", help="media files with video")
    parser.add_argument("--model", default="tiny", help="folder of a run, or a preset (untrained)")
    parser.add_argument("--text", help="a sentence to look for; needs a trained folder")
    parser.add_argument("--sound", help="a media file whose sound to look for")
    parser.add_argument("--windows", type=int, default=1, help="windows to average for each file")
    parser.add_argument("--out", default="embeddings.npz")
    given = parser.parse_args()

    model = vf.create_model(given.model)
    # any number of files; every vector has unit length
    found = model.encode(video=given.files, windows=given.windows)
    z_va, z_vt = found["z_video_va"], found["z_video_vt"]  # (files, d_va), (files, d_vt)
    np.savez(given.out, files=np.array(given.files), z_video_va=z_va, z_video_vt=z_vt)
    print(f"{len(given.files)} files in {given.out}: {tuple(z_va.shape)} and {tuple(z_vt.shape)}")

    similarity = {}
    if given.text:
        similarity[given.text] = z_vt @ model.encode(text=given.text)["z_text_vt"][0]
    if given.sound:
        similarity[given.sound] = z_va @ model.encode(audio=given.sound)["z_audio_va"][0]
    for query, values in similarity.items():
        print(f"\n{query}")
        for i in values.argsort(descending=True):
            print(f"  {float(values[i]):+.3f}  {given.files[i]}")


if __name__ == "__main__":
    main()
