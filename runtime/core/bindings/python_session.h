// A session that is written in Python: see trtllm.runtime.session.Session.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <initializer_list>
#include <memory>

#include "trtllm/session.h"

namespace trtllm::executor {

// A Python object that any thread may let go of.
struct Held {
    explicit Held(nanobind::object given) : object(std::move(given)) {}
    ~Held() {
        if (!nanobind::is_alive()) {  // the interpreter has gone, and its objects with it
            object.release();
            return;
        }
        const nanobind::gil_scoped_acquire lock;
        object.reset();
    }
    nanobind::object object;
};

inline std::shared_ptr<Held> hold(nanobind::object object) { return std::make_shared<Held>(std::move(object)); }

// Memory as a numpy array that does not own it.
template <typename T>
nanobind::object view(T *data, std::initializer_list<std::size_t> shape) {
    return nanobind::cast(nanobind::ndarray<nanobind::numpy, T>(data, shape.size(), shape.begin(), nanobind::handle()),
                          nanobind::rv_policy::reference);
}

class PythonSession : public Session {
public:
    explicit PythonSession(nanobind::object session);
    const SessionInfo &info() const override { return info_; }
    float *step(const StepBatch &batch) override;
    StepCandidates candidates() override;
    void complete(std::int64_t index) override;

private:
    std::shared_ptr<Held> session_, step_, logits_, candidates_;
    SessionInfo info_;
};

}  // namespace trtllm::executor
