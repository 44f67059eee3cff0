// Podfile: pod "onnxruntime-objc". Add model.onnx and labels.txt to the app's bundle.
import Foundation
import onnxruntime_objc

final class Classifier {
    private let session: ORTSession

    init() throws {
        let environment = try ORTEnv(loggingLevel: .warning)
        let options = try ORTSessionOptions()
        let coreML = ORTCoreMLExecutionProviderOptions()
        coreML.createMLProgram = true
        coreML.onlyAllowStaticInputShapes = true
        try options.appendCoreMLExecutionProvider(with: coreML)
        let path = Bundle.main.path(forResource: "@STEM@", ofType: "onnx")!
        session = try ORTSession(env: environment, modelPath: path, sessionOptions: options)
    }

    /// Scores of the classes. `pixels`: @CHANNELS@ planes of @HEIGHT@ x @WIDTH@ bytes, one a channel.
    func scores(pixels: [UInt8]) throws -> [Float] {
        let mean: [Float] = [@MEAN@], std: [Float] = [@STD@]
        let plane = @HEIGHT@ * @WIDTH@
        let input = pixels.enumerated().map { index, value in
            (Float(value) / 255 - mean[index / plane]) / std[index / plane]
        }
        let data = input.withUnsafeBufferPointer { Data(buffer: $0) }
        let tensor = try ORTValue(
            tensorData: NSMutableData(data: data), elementType: .float,
            shape: [1, @CHANNELS@, @HEIGHT@, @WIDTH@])
        let results = try session.run(
            withInputs: ["@INPUT@": tensor], outputNames: ["@OUTPUT@"], runOptions: nil)
        let scores = try results["@OUTPUT@"]!.tensorData() as Data
        return scores.withUnsafeBytes { Array($0.bindMemory(to: Float.self)) }
    }
}
