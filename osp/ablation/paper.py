"""OSP's table 2 (arXiv 2506.19697): 1.4 B parameters, 100 B tokens, one seed; perplexity of WikiText-2."""

SCALE = "1.4 B parameters, 100 B tokens, one seed"
TEXT = "WikiText-2"
BITS = ("16-16-16", "4-8-16", "4-8-8", "4-4-16", "4-4-4")

# Row -> kurtosis by the paper's script; perplexity by bits; the same with the online Hadamard transform of the FFN.
ROWS = {
    "adam": (1818.56, (11.4, 21.6, 21.6, 1e5, 8e4), (11.4, 22.3, 22.3, 3e4, 3e4)),
    "muon_all": (361.35, (11.7, 14.8, 14.8, 1e6, 8e5), (11.7, 15.4, 15.4, 24.5, 24.8)),
    "muon": (1575.12, (11.4, 13.8, 13.8, 934.3, 1e4), (11.4, 12.9, 12.9, 15.7, 15.8)),
    "muon_ssnorm": (66.69, (11.2, 12.4, 12.4, 43.3, 44.2), (11.2, 12.2, 12.2, 33.7, 34.1)),
    "muon_embproj": (703.23, (12.3, 14.8, 14.8, 99.7, 114.6), (12.3, 13.9, 13.9, 22.1, 22.3)),
    "osp": (0.04, (11.2, 12.2, 12.2, 19.4, 19.6), (11.2, 12.1, 12.1, 13.4, 13.5)),
}
TABLE_2 = {  # row -> quantity of osp.ablation.table -> number
    row: {
        "osp_script": kurtosis,
        **dict(zip(BITS, plain, strict=True)),
        **{f"{bits} +Had": value for bits, value in zip(BITS, hadamard, strict=True)},
    }
    for row, (kurtosis, plain, hadamard) in ROWS.items()
}
