// trm_kernels._native: the Python interface of the kernels (documented in trm_kernels/_native.pyi).
//
// Tensors are passed as integers, the addresses of their data, 0 for none: four tensor arguments cost 12 to 21 us per
// call, integers less than 1. Python checks dtypes, shapes, devices and strides, and keeps the tensors alive.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "dispatch.h"

namespace nb = nanobind;

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

void check(bool condition, const char* message) {
    if (!condition) throw nb::value_error(message);
}

void check_threads(int threads) { check(threads >= 1, "threads must be at least 1"); }

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const char* name : trm::kInstructionSets) {
        if (trm::kernels(name)) names.emplace_back(name);
    }
    return names;
}

// Raises ValueError if this build or machine does not support the instruction set named by the caller or environment.
const trm::Kernels& find_kernels(const std::optional<std::string>& name) {
    const trm::Kernels* found = name ? trm::kernels(name->c_str()) : trm::kernels();
    if (found) return *found;
    std::string message;
    if (!name) message = std::string(trm::kInstructionSetVariable) + ": ";
    message += "instruction set '" + (name ? *name : std::string(std::getenv(trm::kInstructionSetVariable))) +
               "' is not supported here: choose from ";
    for (const std::string& here : instruction_sets()) message += here + ", ";
    message.resize(message.size() - 2);
    throw nb::value_error(message.c_str());
}

struct Network {
    trm::Network shape;
    const trm::Kernels* kernels;

    std::vector<trm::Block> blocks(const std::vector<Address>& addresses, const char* message) const {
        static_assert(sizeof(trm::Block) == trm::kBlockTensors * sizeof(Address));
        check(addresses.size() == static_cast<size_t>(shape.blocks) * trm::kBlockTensors, message);
        std::vector<trm::Block> blocks(shape.blocks);
        std::memcpy(static_cast<void*>(blocks.data()), addresses.data(), addresses.size() * sizeof(Address));
        return blocks;
    }
};

Network make_network(int64_t width, int64_t heads, int64_t inner, int64_t blocks, bool pre_norm, bool gated,
                     bool rotary, float eps, int64_t length, int64_t token_inner,
                     const std::optional<std::string>& instruction_set) {
    check(width >= 1 && heads >= 1 && inner >= 1 && blocks >= 1, "width, heads, inner and blocks must be at least 1");
    check(blocks <= trm::kMaxBlocks, "there are more blocks than the kernels support");
    check(width % heads == 0, "heads must divide width");
    check(!rotary || width / heads % 2 == 0, "rotary positions need an even head size");
    check(length >= 0 && (length == 0 || token_inner >= 1), "a token mixer needs a length and an inner width");
    if (length == 0) token_inner = 0;
    return {{width, heads, inner, blocks, pre_norm, gated, rotary, eps, length, token_inner},
            &find_kernels(instruction_set)};
}

trm::Batch make_batch(int64_t rows, int64_t samples, Address starts, Address cos, Address sin, Address positions) {
    check(rows >= 0 && samples >= 0, "rows and samples must not be negative");
    return {rows, samples, at<int32_t>(starts), at<float>(cos), at<float>(sin), at<int32_t>(positions)};
}

trm::Recursion make_recursion(int64_t steps, Address x, Address y, Address z, Address output_norm, float output_eps,
                              float dropout, uint64_t seed, bool recompute) {
    check(steps >= 0, "steps must not be negative");
    check(dropout >= 0.0f && dropout < 1.0f, "dropout must be in [0, 1)");
    return {steps,      at<float>(x), at<float>(y), at<float>(z), at<float>(output_norm),
            output_eps, dropout,      seed,         recompute};
}

int64_t packed_size(const Network& net, bool backward) { return net.kernels->packed_size(net.shape, backward); }

int64_t kept_size(const Network& net, const trm::Batch& batch, const trm::Recursion& recursion) {
    return net.kernels->kept_size(net.shape, batch, recursion);
}

int64_t workspace_size(const Network& net, const trm::Batch& batch, const trm::Recursion& recursion, bool backward,
                       int threads) {
    check_threads(threads);
    return net.kernels->workspace_size(net.shape, batch, recursion, backward, threads);
}

constexpr const char* kParameters = "parameters must have one address per tensor of each block";
constexpr const char* kGradients = "gradients must have one address per tensor of each block";

void pack(const Network& net, const std::vector<Address>& parameters, bool backward, Address packed, int threads) {
    check_threads(threads);
    const auto blocks = net.blocks(parameters, kParameters);
    nb::gil_scoped_release released;
    net.kernels->pack(net.shape, blocks.data(), backward, at<float>(packed), threads);
}

nb::tuple digest(const Network& net, const std::vector<Address>& addresses, const std::vector<int64_t>& bytes,
                 int threads) {
    check_threads(threads);
    check(addresses.size() == bytes.size(), "sizes and addresses must have the same length");
    std::vector<trm::Span> spans;
    for (size_t i = 0; i < bytes.size(); ++i) {
        check(bytes[i] >= 0, "sizes must not be negative");
        spans.push_back({at<const char>(addresses[i]), bytes[i]});
    }
    const auto count = static_cast<int64_t>(spans.size());
    std::vector<uint64_t> digests(static_cast<size_t>(net.kernels->digest_size(spans.data(), count)));
    {
        nb::gil_scoped_release released;
        net.kernels->digest(spans.data(), count, digests.data(), threads);
    }
    return nb::make_tuple(digests[0], digests[1]);
}

void forward(const Network& net, const trm::Batch& batch, const trm::Recursion& recursion, Address packed,
             Address kept, Address workspace, Address y_out, Address z_out, int threads) {
    check_threads(threads);
    nb::gil_scoped_release released;
    net.kernels->forward(net.shape, batch, recursion, at<float>(packed), at<float>(kept), at<float>(workspace),
                         at<float>(y_out), at<float>(z_out), threads);
}

void backward(const Network& net, const trm::Batch& batch, const trm::Recursion& recursion,
              const std::vector<Address>& parameters, Address packed, Address kept, Address workspace,
              Address dy_out, Address dz_out, Address dx, Address dy, Address dz,
              const std::vector<Address>& gradients, Address output_norm_gradient, int threads) {
    check_threads(threads);
    const auto blocks = net.blocks(parameters, kParameters);
    const auto block_gradients = net.blocks(gradients, kGradients);
    nb::gil_scoped_release released;
    net.kernels->backward(net.shape, batch, recursion, blocks.data(), at<float>(packed), at<float>(kept),
                          at<float>(workspace), at<float>(dy_out), at<float>(dz_out), at<float>(dx), at<float>(dy),
                          at<float>(dz), block_gradients.data(), at<float>(output_norm_gradient), threads);
}

void dropout_mask(const Network& net, const trm::Recursion& recursion, int64_t call_block, int64_t head,
                  int64_t first_row, int64_t rows, Address mask) {
    net.kernels->dropout_mask(recursion, call_block, head, first_row, rows, at<float>(mask));
}

template <auto Rate>
double measure(double seconds, int threads, const std::optional<std::string>& name) {
    check_threads(threads);
    const trm::Kernels& kernels = find_kernels(name);
    nb::gil_scoped_release released;
    return (kernels.*Rate)(seconds, threads);
}

}  // namespace

NB_MODULE(_native, m) {
    using namespace nb::literals;

    // Autograd graphs may keep these objects alive until the interpreter exits, which is not a leak.
    nb::set_leak_warnings(false);

    m.def("instruction_sets", instruction_sets);
    m.def("default_instruction_set", [] { return find_kernels(std::nullopt).name; });
    m.def("fma_peak", measure<&trm::Kernels::fma_peak>, "seconds"_a, "threads"_a, "name"_a = nb::none());
    m.def("tile_rate", measure<&trm::Kernels::tile_rate>, "seconds"_a, "threads"_a, "name"_a = nb::none());

    nb::class_<trm::Batch>(m, "Batch")
        .def(
            "__init__",
            [](trm::Batch* self, int64_t rows, int64_t samples, Address starts, Address cos, Address sin,
               Address positions) { new (self) trm::Batch(make_batch(rows, samples, starts, cos, sin, positions)); },
            "rows"_a, "samples"_a, "starts"_a, "cos"_a, "sin"_a, "positions"_a);

    nb::class_<trm::Recursion>(m, "Recursion")
        .def(
            "__init__",
            [](trm::Recursion* self, int64_t steps, Address x, Address y, Address z, Address output_norm,
               float output_eps, float dropout, uint64_t seed, bool recompute) {
                new (self) trm::Recursion(
                    make_recursion(steps, x, y, z, output_norm, output_eps, dropout, seed, recompute));
            },
            "steps"_a, "x"_a, "y"_a, "z"_a, "output_norm"_a, "output_eps"_a, "dropout"_a, "seed"_a, "recompute"_a);

    nb::class_<Network>(m, "Network")
        .def(
            "__init__",
            [](Network* self, int64_t width, int64_t heads, int64_t inner, int64_t blocks, bool pre_norm, bool gated,
               bool rotary, float eps, int64_t length, int64_t token_inner,
               const std::optional<std::string>& instruction_set) {
                new (self) Network(
                    make_network(width, heads, inner, blocks, pre_norm, gated, rotary, eps, length, token_inner,
                                 instruction_set));
            },
            "width"_a, "heads"_a, "inner"_a, "blocks"_a, "pre_norm"_a, "gated"_a, "rotary"_a, "eps"_a,
            "length"_a = 0, "token_inner"_a = 0, "instruction_set"_a = nb::none())
        .def_prop_ro("instruction_set", [](const Network& net) { return net.kernels->name; })
        .def_prop_ro("vector", [](const Network& net) { return net.kernels->vector; })
        .def("packed_size", packed_size, "backward"_a)
        .def("kept_size", kept_size, "batch"_a, "recursion"_a)
        .def("workspace_size", workspace_size, "batch"_a, "recursion"_a, "backward"_a, "threads"_a)
        .def("pack", pack, "parameters"_a, "backward"_a, "packed"_a, "threads"_a)
        .def("digest", digest, "addresses"_a, "sizes"_a, "threads"_a)
        .def("forward", forward, "batch"_a, "recursion"_a, "packed"_a, "kept"_a, "workspace"_a, "y_out"_a,
             "z_out"_a, "threads"_a)
        .def("backward", backward, "batch"_a, "recursion"_a, "parameters"_a, "packed"_a, "kept"_a, "workspace"_a,
             "dy_out"_a, "dz_out"_a, "dx"_a, "dy"_a, "dz"_a, "gradients"_a, "output_norm_gradient"_a, "threads"_a)
        .def("dropout_mask", dropout_mask, "recursion"_a, "call_block"_a, "head"_a, "first_row"_a, "rows"_a,
             "mask"_a);
}
