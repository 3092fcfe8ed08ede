"""Numbers about pictures: agreement with the prompt, consistency, diversity, size of an edit, GenEval, FID.

All formulas are plain arithmetic on embeddings, detections or pixels, as float64 NumPy arrays; models that make these
are objects beside them (``encoders``, ``extractors``), which load what they are told to and nothing in its place.

| module | gives |
|---|---|
| ``agreement`` | cosine, CLIPScore, full-prompt, minimum-object and text-text similarity |
| ``templates`` | ImageNet's 80 templates, a prompt in them, a prompt's parts |
| ``sets`` | consistency of a set, diversity of a prompt, subjects on noise |
| ``pixels`` | RMS distance, PSNR, SSIM |
| ``geneval``, ``geneval_files`` | GenEval's rules over detections, and files of them |
| ``judged`` | detections and presence by the small world's judge |
| ``frechet`` | FID and KID of given features |
| ``measures``, ``summary`` | all of it over many pictures, with intervals and differences |
"""
