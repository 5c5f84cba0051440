// Binds quantization and conversion; trtllm/checkpoints/quantize.py is the face that users call.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "checkpoints/native/convert.h"
#include "checkpoints/native/gptq.h"
#include "checkpoints/native/mapped.h"
#include "checkpoints/native/parallel.h"
#include "checkpoints/native/quantize.h"
#include "checkpoints/native/scale_search.h"
#include "checkpoints/native/sha256.h"
#include "checkpoints/native/tiles.h"
#include "checkpoints/native/transpose.h"

namespace nb = nanobind;

namespace {

using Source = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Halves = nb::ndarray<std::uint16_t, nb::c_contig, nb::device::cpu>;
using Destination = nb::ndarray<nb::c_contig, nb::device::cpu>;

trtllm::Float float_named(const std::string &name) {
    if (name == "float32") return trtllm::Float::float32;
    if (name == "float16") return trtllm::Float::float16;
    if (name == "bfloat16") return trtllm::Float::bfloat16;
    throw std::invalid_argument("'" + name + "' is none of float32, float16, bfloat16");
}

void require(bool condition, const char *what) {
    if (!condition) throw std::invalid_argument(what);
}

// Returns (fault, block): "" when all went well, else "not_finite" or "scale_overflow" and the first block at fault.
nb::tuple quantize_blocks(const Source &source, const std::string &dtype, int bits, std::size_t block_size,
                          Destination values, Destination scales, const std::string &scale_dtype, int threads,
                          bool scalar, bool search, const std::optional<Floats> &importance,
                          const std::optional<Halves> &minima, bool tiled) {
    const trtllm::BlockJob job{source.data(),
                               float_named(dtype),
                               bits,
                               block_size,
                               static_cast<std::uint8_t *>(values.data()),
                               scales.data(),
                               float_named(scale_dtype),
                               search,
                               importance ? importance->data() : nullptr,
                               importance ? importance->size() : 0,
                               minima ? minima->data() : nullptr};
    require(bits == 4 || bits == 8, "bits is 4 or 8");
    require(block_size >= 16 && block_size % 16 == 0, "block_size is a multiple of 16");
    require(source.size() % block_size == 0, "the source is no whole number of blocks");
    require(source.itemsize() == trtllm::size_of(job.dtype), "the source is not of the dtype named");
    require(scales.itemsize() == trtllm::size_of(job.scale_dtype), "the scales are not of the dtype named");
    require(!search || block_size <= trtllm::kLongestBlock, "block_size is too large for a search");
    require(!importance || (job.columns > 0 && job.columns % block_size == 0 && source.size() % job.columns == 0),
            "the importance is not that of a row");
    const std::size_t blocks = source.size() / block_size;
    const std::size_t rows = tiled ? source.shape(0) : 0, row_blocks = tiled && rows > 0 ? blocks / rows : 0;
    require(!tiled || (source.ndim() == 2 && block_size == 32 && !scalar && !importance && !minima),
            "tiles are of matrices, in blocks of 32");
    require(values.nbytes() == (tiled ? (rows + 15) / 16 * row_blocks * 64 * bits : source.size() * bits / 8) &&
                scales.size() == blocks,
            "an output is of the wrong size");
    require(!minima || (bits == 4 && job.scale_dtype == trtllm::Float::float16 && minima->size() == blocks &&
                        block_size <= trtllm::kLongestBlock),
            "minima are float16, one for each block of 4-bit integers with float16 scales");
    trtllm::Outcome outcome;
    {
        nb::gil_scoped_release release;
        outcome = scalar  ? trtllm::quantize_range_scalar(job, 0, blocks)
                  : tiled ? trtllm::quantize_tiles(job, rows, row_blocks, threads)
                          : trtllm::quantize_blocks(job, blocks, threads);
    }
    const char *fault = outcome.fault == trtllm::Fault::none         ? ""
                        : outcome.fault == trtllm::Fault::not_finite ? "not_finite"
                                                                     : "scale_overflow";
    return nb::make_tuple(fault, outcome.block);
}

void convert(const Source &source, const std::string &from, Destination destination, const std::string &to,
             int threads) {
    const trtllm::Float from_dtype = float_named(from), to_dtype = float_named(to);
    require(source.itemsize() == trtllm::size_of(from_dtype), "the source is not of the dtype named");
    require(destination.itemsize() == trtllm::size_of(to_dtype), "the destination is not of the dtype named");
    require(source.size() == destination.size(), "source and destination differ in size");
    nb::gil_scoped_release release;
    trtllm::convert(source.data(), from_dtype, destination.data(), to_dtype, source.size(), threads);
}

// The columns from `first` on of destination [columns, stride] become the rows of source [rows, columns].
void transpose(const Source &source, Destination destination, std::size_t first) {
    require(source.ndim() == 2 && destination.ndim() == 2, "matrices are wanted");
    require(source.itemsize() == destination.itemsize() && (source.itemsize() == 2 || source.itemsize() == 4),
            "elements are of 2 or 4 bytes");
    const std::size_t rows = source.shape(0), columns = source.shape(1), stride = destination.shape(1);
    require(destination.shape(0) == columns && first + rows <= stride, "the destination is of another shape");
    nb::gil_scoped_release release;
    trtllm::transpose(source.data(), rows, columns, source.itemsize(),
                      static_cast<std::uint8_t *>(destination.data()) + first * source.itemsize(), stride);
}

// Tiles [tiles, blocks, ...] of values (bits 4 or 8) or, with bits 16, of float16 scales.
void tile(const Source &source, std::size_t rows, std::size_t blocks, int bits, Destination tiles, int threads) {
    const std::size_t count = (rows + 15) / 16;
    require(bits == 4 || bits == 8 || bits == 16, "bits is 4 or 8, or 16 for scales");
    require(source.nbytes() == (bits == 16 ? rows * blocks * 2 : rows * blocks * 4 * bits), "the source is of the wrong size");
    require(tiles.nbytes() == (bits == 16 ? count * blocks * 32 : count * blocks * 64 * bits), "the tiles are of the wrong size");
    nb::gil_scoped_release release;
    // Tiling runs at the speed of memory: a thread of its own is worth it for megabytes.
    const std::size_t grain = std::max<std::size_t>(1, (std::size_t{1} << 20) / std::max<std::size_t>(1, 512 * blocks));
    trtllm::parallel_ranges(count, grain, threads, [&](std::size_t first, std::size_t last) {
        if (bits == 16)
            trtllm::tile_scales(static_cast<const std::uint16_t *>(source.data()), rows, blocks,
                                static_cast<std::uint16_t *>(tiles.data()), first, last);
        else
            trtllm::tile_values(static_cast<const std::uint8_t *>(source.data()), rows, blocks, bits,
                                static_cast<std::uint8_t *>(tiles.data()), first, last);
    });
}

// False when a scale is not finite. See checkpoints/native/gptq.h; the weights are used up.
bool gptq(nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu> weights,
          nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu> factor,
          nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> order, const Floats &importance,
          int bits, std::size_t block_size, bool static_scales, Destination values, Destination scales,
          const std::optional<Halves> &minima, int threads) {
    const std::size_t rows = weights.shape(0), columns = weights.shape(1);
    require(bits == 4 || bits == 8, "bits is 4 or 8");
    require(block_size >= 16 && block_size % 16 == 0 && block_size <= trtllm::kLongestBlock, "block_size does not fit");
    require(columns % block_size == 0, "the weights are no whole number of blocks");
    require(factor.shape(0) == columns && factor.shape(1) == columns, "the factor is not of the weights' columns");
    require(order.size() == columns && importance.size() == columns, "order and importance are of every column");
    require(values.nbytes() == rows * columns * bits / 8, "the values are of the wrong size");
    require(scales.nbytes() == rows * (columns / block_size) * 2, "the scales are of the wrong size");
    require(!minima || (bits == 4 && minima->size() * 2 == scales.nbytes()), "minima are one for each block of 4 bits");
    const trtllm::GptqJob job{weights.data(),    factor.data(), order.data(),
                              importance.data(), columns,       block_size,
                              bits,              static_scales, static_cast<std::uint8_t *>(values.data()),
                              static_cast<std::uint16_t *>(scales.data()), minima ? minima->data() : nullptr};
    nb::gil_scoped_release release;
    return trtllm::gptq_rows(job, rows, threads);
}

// uint8 [count], read-only, unmapped when it is collected; None where map_cached() maps nothing.
nb::object map_cached(int descriptor, std::uint64_t offset, std::size_t count) {
    trtllm::MappedRange range;
    {
        nb::gil_scoped_release release;
        range = trtllm::map_cached(descriptor, offset, count);
    }
    if (range.base == nullptr) return nb::none();
    nb::capsule owner(new trtllm::MappedRange(range), [](void *held) noexcept {
        const auto *mapped = static_cast<trtllm::MappedRange *>(held);
        {
            nb::gil_scoped_release release;
            trtllm::unmap(*mapped);
        }
        delete mapped;
    });
    return nb::cast(nb::ndarray<nb::numpy, const std::uint8_t, nb::ndim<1>>(range.bytes, {count}, owner));
}

const std::uint8_t *bytes_of(const Source &payload) { return static_cast<const std::uint8_t *>(payload.data()); }

// update_both() of the file's message and each weight's.
void update_in_turn(trtllm::Sha256State &whole, const std::vector<trtllm::Sha256State *> &digests,
                    const std::vector<Source> &payloads) {
    require(digests.size() == payloads.size(), "digests and payloads are not as many");
    require(std::find(digests.begin(), digests.end(), nullptr) == digests.end(), "a digest is missing");
    nb::gil_scoped_release release;
    for (std::size_t i = 0; i < payloads.size(); ++i)
        trtllm::update_both(whole, *digests[i], bytes_of(payloads[i]), payloads[i].nbytes());
}

std::string hex_digest(const trtllm::Sha256State &state) {
    std::string text;
    for (const std::uint8_t byte : state.digest()) {
        text += "0123456789abcdef"[byte >> 4];
        text += "0123456789abcdef"[byte & 15];
    }
    return text;
}

}  // namespace

void bind_checkpoints(nb::module_ &module) {
    module.def("quantize_blocks", &quantize_blocks, nb::arg("source"), nb::arg("dtype"), nb::arg("bits"),
               nb::arg("block_size"), nb::arg("values"), nb::arg("scales"), nb::arg("scale_dtype"),
               nb::arg("threads") = 0, nb::arg("scalar") = false, nb::arg("search") = false,
               nb::arg("importance") = nb::none(), nb::arg("minima") = nb::none(), nb::arg("tiled") = false);
    module.def("gptq", &gptq, nb::arg("weights"), nb::arg("factor"), nb::arg("order"), nb::arg("importance"),
               nb::arg("bits"), nb::arg("block_size"), nb::arg("static_scales"), nb::arg("values"), nb::arg("scales"),
               nb::arg("minima") = nb::none(), nb::arg("threads") = 0);
    module.def("convert", &convert, nb::arg("source"), nb::arg("from_dtype"), nb::arg("destination"),
               nb::arg("to_dtype"), nb::arg("threads") = 0);
    module.def("transpose", &transpose, nb::arg("source"), nb::arg("destination"), nb::arg("first") = 0);
    module.def("tile", &tile, nb::arg("source"), nb::arg("rows"), nb::arg("blocks"), nb::arg("bits"), nb::arg("tiles"),
               nb::arg("threads") = 0);
    module.def("map_cached", &map_cached, nb::arg("descriptor"), nb::arg("offset"), nb::arg("count"));
    nb::class_<trtllm::Sha256State>(module, "Sha256")
        .def(nb::init<>())
        .def(
            "update",
            [](trtllm::Sha256State &state, const Source &payload) {
                nb::gil_scoped_release release;
                trtllm::update(state, bytes_of(payload), payload.nbytes());
            },
            nb::arg("payload"))
        .def("hexdigest", &hex_digest);
    module.def("has_sha256_instructions", &trtllm::has_sha256_instructions);
    module.def(
        "update_both",
        [](trtllm::Sha256State &one, trtllm::Sha256State &other, const Source &payload) {
            nb::gil_scoped_release release;
            trtllm::update_both(one, other, bytes_of(payload), payload.nbytes());
        },
        nb::arg("one"), nb::arg("other"), nb::arg("payload"));
    module.def("update_in_turn", &update_in_turn, nb::arg("whole"), nb::arg("digests"), nb::arg("payloads"));
}
