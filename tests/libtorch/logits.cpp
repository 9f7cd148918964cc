// Runs an exported TorchScript model without Python: prints its config, then the logits of the last position.
//
//     logits MODEL.pt ID [ID ...]
//
// By hand: g++ -std=c++20 logits.cpp with the include and lib folders of libtorch, as tests/test_export.py does it.

#include <torch/script.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <vector>

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: logits MODEL.pt ID [ID ...]\n");
    return 2;
  }
  std::vector<int64_t> ids;
  for (int i = 2; i < argc; ++i) ids.push_back(std::atoll(argv[i]));
  try {
    // What rides along in the file: the sizes of the model and its tokenizer (for a tokenizers binding to read).
    torch::jit::ExtraFilesMap extra{{"config.json", ""}, {"tokenizer.json", ""}};
    torch::jit::Module model = torch::jit::load(argv[1], torch::kCPU, extra);
    std::printf("%zu %zu\n", extra["config.json"].size(), extra["tokenizer.json"].size());

    c10::InferenceMode guard;
    torch::Tensor input = torch::tensor(ids, torch::kLong).unsqueeze(0);  // (batch, time)
    auto outputs = model.forward({input, c10::IValue()}).toTuple();       // (logits, loss); None: no targets
    torch::Tensor last = outputs->elements()[0].toTensor()[0][-1].contiguous();
    for (int64_t i = 0; i < last.numel(); ++i) std::printf("%.9g\n", last.data_ptr<float>()[i]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
