// The versions that a library was built of and with, for softmax_ext/library_file.py, which finds them in the file of
// one that can't be loaded, or must not be. The program does not read them.
namespace {

[[gnu::used]] const char build_record[] =
    "softmax_ext build record: softmax_ext " SOFTMAX_EXT_VERSION ", torch " SOFTMAX_EXT_BUILT_TORCH;

}  // namespace
