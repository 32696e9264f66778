// The versions that a library was built of and with. softmax_ext/libraries.py reads them from the file before it loads
// it. The program does not read them.
namespace {

[[gnu::used]] const char build_record[] =
    "softmax_ext build record: softmax_ext " SOFTMAX_EXT_VERSION ", torch " SOFTMAX_EXT_BUILT_TORCH;

}  // namespace
